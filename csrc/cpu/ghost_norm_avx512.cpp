// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "ghost_norm_kernel.h"

const fillm::Kernels* fillm::avx512_kernels() { return kKernels; }
