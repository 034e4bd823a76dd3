// For every processor the compiler targets by default.
#include "matmul_kernel.h"

const fillm::MatmulKernels* fillm::generic_matmul() { return kMatmul; }
