#include "instruction_sets.h"

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
    if (wanted.empty()) return available - 1;
    for (int i = 0; i < available; ++i)
        if (wanted == names[i]) return i;
    throw std::invalid_argument("this build on this processor has no instruction set '" + wanted + "'");
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
