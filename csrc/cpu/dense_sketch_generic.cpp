// For every processor the compiler targets by default.
#include "dense_sketch_kernel.h"

const fillm::DenseKernels* fillm::dense_generic_kernels() { return kDenseKernels; }
