// Driver of soir_sweep: rows are cut into parts by sizes alone, each part has an accumulator of its own, and the parts of
// a tensor are added in order; so the bits depend on nothing but the instruction set.
#include "soir_sweep.h"

#include <algorithm>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace fillm {
namespace {

constexpr int64_t kPartBytes = 1 << 22;       // of the store: long beside its accumulator
constexpr int64_t kMostParts = 16;
constexpr int64_t kAccumulatorBytes = 1 << 25;  // of all accumulators at a time

const SoirSweepKernels* kernels_of(int instruction_set) {
#ifdef FILLM_X86
    if (instruction_set == 1) return avx2_soir_sweep();
    if (instruction_set == 2) return avx512_soir_sweep();
#endif
    (void)instruction_set;
    return generic_soir_sweep();
}

const void* at(const void* data, int64_t index, int64_t itemsize) {
    return static_cast<const unsigned char*>(data) + index * itemsize;
}

void* at(void* data, int64_t index, int64_t itemsize) { return static_cast<unsigned char*>(data) + index * itemsize; }

double lambda_of(const SoirSweepArguments& arguments, int64_t tensor) {
    double sum = 0;
    for (int64_t i = 0; i < arguments.rows; ++i) sum += arguments.norms[tensor * arguments.rows + i];
    return arguments.rows ? arguments.damping * (sum / static_cast<double>(arguments.rows)) / arguments.numel[tensor] : 0;
}

}  // namespace

void soir_sweep(const SoirSweepArguments& arguments, const char* instruction_set) {
    const SoirSweepKernels& kernels = kernels_of(instruction_set_index(instruction_set))[arguments.dtype];
    const int64_t rows = arguments.rows, k = arguments.k, stored = itemsize_of(arguments.dtype);
    const int64_t wide = arguments.dtype == kFloat64 ? 8 : 4;
    const int64_t parts = std::clamp<int64_t>(rows * k * stored / kPartBytes, 1, kMostParts);
    const int64_t at_a_time = std::clamp<int64_t>(kAccumulatorBytes / std::max<int64_t>(1, parts * k * wide), 1,
                                                  std::max<int64_t>(1, arguments.tensors));
    std::vector<double> sums(static_cast<size_t>(at_a_time * parts * k * wide / 8 + 1));  // doubles for their alignment
    std::vector<double> cross(static_cast<size_t>(at_a_time * parts));
    for (int64_t first = 0; first < arguments.tensors; first += at_a_time) {
        const int64_t tensors = std::min(at_a_time, arguments.tensors - first);
        parallel(tensors * parts, 1, arguments.threads, [&](int64_t item, int64_t) {
            const int64_t tensor = first + item / parts, part = item % parts;
            const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts, row = tensor * rows + begin;
            SweepTask task{at(arguments.s, row * k, stored), at(arguments.v, tensor * k, wide), arguments.norms + row,
                           lambda_of(arguments, tensor), end - begin, k, at(arguments.dots, row, wide),
                           at(sums.data(), item * k, wide), 0};
            kernels.sweep(task);
            cross[static_cast<size_t>(item)] = task.cross;
        });
        parallel(tensors, 1, arguments.threads, [&](int64_t item, int64_t) {
            const int64_t tensor = first + item;
            double* pieces = arguments.pieces + 4 * tensor;
            double sum = 0;
            for (int64_t part = 0; part < parts; ++part) sum += cross[static_cast<size_t>(item * parts + part)];
            pieces[0] = lambda_of(arguments, tensor);
            pieces[1] = rows ? sum / static_cast<double>(rows) : 0;
            kernels.join(at(sums.data(), item * parts * k, wide), parts, k, at(arguments.v, tensor * k, wide),
                         static_cast<double>(rows), at(arguments.weighted, tensor * k, wide), pieces + 2);
        });
    }
}

}  // namespace fillm
