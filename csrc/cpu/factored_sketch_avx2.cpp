// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "factored_sketch_kernel.h"

const fillm::FactoredKernels* fillm::factored_avx2_kernels() { return kFactoredKernels; }
