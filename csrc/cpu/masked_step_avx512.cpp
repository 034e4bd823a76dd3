// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "masked_step_kernel.h"

const fillm::MaskedStepKernels* fillm::avx512_masked_step() { return kMaskedStep; }
