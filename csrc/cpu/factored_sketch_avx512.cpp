// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "factored_sketch_kernel.h"

const fillm::FactoredKernels* fillm::factored_avx512_kernels() { return kFactoredKernels; }
