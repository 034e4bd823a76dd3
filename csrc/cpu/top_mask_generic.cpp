// For every processor the compiler targets by default.
#include "top_mask_kernel.h"

const fillm::TopMaskKernels* fillm::generic_top_mask() { return kTopMask; }
