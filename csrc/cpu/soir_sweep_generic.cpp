// For every processor the compiler targets by default.
#include "soir_sweep_kernel.h"

const fillm::SoirSweepKernels* fillm::generic_soir_sweep() { return kSoirSweep; }
