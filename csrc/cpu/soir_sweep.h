// soir_sweep on the CPU: what the driver (soir_sweep.cpp) and the per-instruction-set kernels share.
#pragma once

#include <cstdint>

#include "types.h"

namespace fillm {

// Some rows of one tensor's store. Accumulators are float (double for float64).
struct SweepTask {
    const void* s;         // [rows, k], rows next to each other
    const void* v;         // [k], in the accumulators' type
    const double* norms;   // [rows]
    double lambda;
    int64_t rows, k;
    void* dots;            // [rows], written
    void* sum;             // [k], written: sum_i c_i s_i
    double cross;          // written: sum_i c_i d_i
};

struct SoirSweepKernels {
    void (*sweep)(SweepTask& task);
    // to[j] = the sum over `parts` of from[part][j], and the squares of v - to / rows and of v in `squares`.
    void (*join)(const void* from, int64_t parts, int64_t k, const void* v, double rows, void* to, double squares[2]);
};

const SoirSweepKernels* generic_soir_sweep();  // kDtypes entries
#ifdef FILLM_X86
const SoirSweepKernels* avx2_soir_sweep();
const SoirSweepKernels* avx512_soir_sweep();
#endif

struct SoirSweepArguments {
    const void* s;          // [tensors, rows, k], contiguous
    const void* v;          // [tensors, k], float (double for float64), as dots and weighted
    const double* norms;    // [tensors, rows]
    const double* numel;    // [tensors], true sizes
    double damping;
    int64_t tensors, rows, k;
    void* dots;             // [tensors, rows], written
    void* weighted;         // [tensors, k], written
    double* pieces;         // [tensors, 4], written: lambda, (1/n) sum_i c_i d_i, |v - w/n|^2, |v|^2
    Dtype dtype;
    int threads;
};

void soir_sweep(const SoirSweepArguments& arguments, const char* instruction_set);

}  // namespace fillm
