// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "dense_sketch_kernel.h"

const fillm::DenseKernels* fillm::dense_avx512_kernels() { return kDenseKernels; }
