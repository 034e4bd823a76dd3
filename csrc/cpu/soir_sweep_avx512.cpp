// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "soir_sweep_kernel.h"

const fillm::SoirSweepKernels* fillm::avx512_soir_sweep() { return kSoirSweep; }
