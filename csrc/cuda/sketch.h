// sketch on CUDA devices, the sparse kinds: what the binding and the kernels share.
#pragma once

#include <cstdint>

#include "../cpu/types.h"

namespace fillm {

// A block-wise map (fillm_kernels/seed_law.py: BlockMap) of a piece of longer vectors. `kind` is the position in KINDS.
struct CudaSketch {
    uint64_t seed;
    uint32_t kind;
    int64_t chunks, ranges, width;
    int64_t samples, count;  // g [samples, count]
    int64_t stride, step;    // entries from one row to the next, and from one entry to the next
    int64_t offset;          // flat coordinate of g[:, 0]

    int64_t dim() const { return chunks * ranges * width; }
};

// Parts that a vector is cut into: a function of the map and the vector's length, of nothing else.
int64_t cuda_sketch_parts(const CudaSketch& job);

// values: [samples, count], on the device. parts: [samples, cuda_sketch_parts, dim], scratch, and out: [samples, dim],
// both float32 (float64 for float64), are written. Everything runs on `stream`.
void cuda_sketch(const CudaSketch& job, Dtype dtype, const void* values, void* parts, void* out, double scale,
                 uintptr_t stream);

}  // namespace fillm
