// What every op's driver and kernels share: element types and the ragged convention's matrices.
#pragma once

#include <cstdint>

namespace fillm {

// Element types, by the numbers of fillm_kernels/native.py.
enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDtypes = 4 };

inline int itemsize_of(Dtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

struct Matrix {         // [rows, columns], entries of one row next to each other
    const void* data;
    int64_t stride;     // entries from one row to the next
    int64_t columns;
};

}  // namespace fillm
