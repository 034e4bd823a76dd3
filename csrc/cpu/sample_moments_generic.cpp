// For every processor the compiler targets by default.
#include "sample_moments_kernel.h"

const fillm::MomentsKernels* fillm::generic_moments() { return kMoments; }
