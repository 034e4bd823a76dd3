// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "masked_step_kernel.h"

const fillm::MaskedStepKernels* fillm::avx2_masked_step() { return kMaskedStep; }
