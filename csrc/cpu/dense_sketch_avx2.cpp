// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "dense_sketch_kernel.h"

const fillm::DenseKernels* fillm::dense_avx2_kernels() { return kDenseKernels; }
