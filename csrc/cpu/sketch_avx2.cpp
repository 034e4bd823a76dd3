// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "sketch_kernel.h"

const fillm::SketchKernels* fillm::sketch_avx2_kernels() { return kSketchKernels; }
