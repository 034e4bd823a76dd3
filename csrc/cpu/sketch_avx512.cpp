// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "sketch_kernel.h"

const fillm::SketchKernels* fillm::sketch_avx512_kernels() { return kSketchKernels; }
