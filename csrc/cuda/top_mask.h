// top_mask on CUDA devices: what the binding and the kernels share.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/types.h"

namespace fillm {

constexpr int kPieceScores = 16384;        // scores that a thread block takes at a time
constexpr int64_t kDigitValues = 1 << 16;  // digits have 16 bits

// One score tensor, on the device in an array that ends with an entry whose `first_piece` is the number of all pieces.
struct ScoreTensor {
    const void* scores;
    int64_t size;
    uint8_t* bits;  // [ceil(size / 8)], aligned to 4 bytes
    int64_t first_piece;
};

// What one kernel leaves to the next, on the device.
struct Selection {
    int64_t remaining;  // rank of the wanted key among those that begin with `key`, from the largest; first the budget
    uint64_t key;       // its digits that are known, later the key itself
    int64_t ties;       // keys that begin with `key`
    int64_t nan;        // first tensor with a NaN; first the largest number
    uint64_t ticket;    // pieces that have been begun to be written; first 0
};

struct CudaTopMask {
    const ScoreTensor* tensors;
    int64_t count, pieces;  // of tensors, and of their pieces
    Selection* selection;
    uint64_t* totals;  // [kDigitValues], zeros, and zeros again afterwards
    uint64_t* ties;    // [pieces], zeros
    Dtype dtype;
};

// Finds the wanted key and writes the bits. With `count_only` no more than the first digit is counted, which finds NaN.
void cuda_top_mask(const CudaTopMask& job, bool count_only, uintptr_t stream);

}  // namespace fillm
