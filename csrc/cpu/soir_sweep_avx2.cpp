// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "soir_sweep_kernel.h"

const fillm::SoirSweepKernels* fillm::avx2_soir_sweep() { return kSoirSweep; }
