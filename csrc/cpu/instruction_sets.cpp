#include "instruction_sets.h"

#include <cstdlib>
#include <stdexcept>

namespace fillm {

int instruction_sets(const char* names[3]) {
    int count = 0;
    names[count++] = "generic";
#ifdef FILLM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        names[count++] = "avx2";
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            names[count++] = "avx512";
    }
#endif
    return count;
}

int instruction_set_index(const std::string& wanted) {
    const char* names[3];
    const int available = instruction_sets(names);
    // What a caller asks for wins over the environment, and the environment over the widest there is.
    const char* environment = std::getenv("FILLM_INSTRUCTION_SET");
    const std::string chosen = wanted.empty() && environment ? environment : wanted;
    if (chosen.empty()) return available - 1;
    for (int i = 0; i < available; ++i)
        if (chosen == names[i]) return i;
    throw std::invalid_argument((wanted.empty() ? "FILLM_INSTRUCTION_SET: " : "") +
                                ("this build on this processor has no instruction set '" + chosen + "'"));
}

bool on_amd() {
#ifdef FILLM_X86
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
}

}  // namespace fillm
