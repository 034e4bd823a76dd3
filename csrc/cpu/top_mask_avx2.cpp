// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "top_mask_kernel.h"

const fillm::TopMaskKernels* fillm::avx2_top_mask() { return kTopMask; }
