// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "ghost_norm_kernel.h"

const fillm::Kernels* fillm::avx2_kernels() { return kKernels; }
