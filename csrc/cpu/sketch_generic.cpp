// For every processor the compiler targets by default.
#include "sketch_kernel.h"

const fillm::SketchKernels* fillm::sketch_generic_kernels() { return kSketchKernels; }
