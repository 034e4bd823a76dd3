// Compiled with AVX2, FMA and F16C; called only where the processor has them.
#include "sample_moments_kernel.h"

const fillm::MomentsKernels* fillm::avx2_moments() { return kMoments; }
