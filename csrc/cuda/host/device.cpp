#include "../device.cu"
