// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "matmul_kernel.h"

const fillm::MatmulKernels* fillm::avx2_matmul() { return kMatmul; }
