#include "../top_mask.cu"
