// For every processor the compiler targets by default.
#include "masked_step_kernel.h"

const fillm::MaskedStepKernels* fillm::generic_masked_step() { return kMaskedStep; }
