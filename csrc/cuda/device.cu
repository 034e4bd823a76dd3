// For the binding, which is compiled without nvcc.
#include "launch.h"

namespace fillm {

void use_cuda_device(int device) { use_device(device); }

}  // namespace fillm
