// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "matmul_kernel.h"

const fillm::MatmulKernels* fillm::avx512_matmul() { return kMatmul; }
