// For every processor the compiler targets by default.
#include "factored_sketch_kernel.h"

const fillm::FactoredKernels* fillm::factored_generic_kernels() { return kFactoredKernels; }
