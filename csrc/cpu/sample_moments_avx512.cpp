// Compiled with AVX-512 F, BW, DQ and VL; called only where the processor has them.
#include "sample_moments_kernel.h"

const fillm::MomentsKernels* fillm::avx512_moments() { return kMoments; }
