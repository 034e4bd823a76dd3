// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "top_mask_kernel.h"

const fillm::TopMaskKernels* fillm::avx512_top_mask() { return kTopMask; }
