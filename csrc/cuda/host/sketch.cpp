#include "../sketch.cu"
