// A running sum over pieces that thread blocks take in order, without a pass of its own (decoupled look-back: Merrill
// and Garland 2016, NVIDIA NVR-2016-002). A word a piece, zero at first, says what its block has made known.
#pragma once

#include "launch.h"

namespace fillm {
namespace {

// What a piece makes known: nothing yet, its own ties, or the ties of all pieces up to it.
constexpr uint64_t kOwnTies = uint64_t(1) << 62, kAllTies = uint64_t(2) << 62, kNumber = kOwnTies - 1;

__device__ inline uint64_t peek(const uint64_t* word) { return *const_cast<const volatile uint64_t*>(word); }
__device__ inline void publish(uint64_t* word, uint64_t value) { *const_cast<volatile uint64_t*>(word) = value; }

// Ties before a piece: the sum over earlier pieces, 32 at a time, back to one that knows it. By a whole warp.
__device__ inline uint64_t ties_before(const uint64_t* ties, int64_t piece) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    uint64_t sum = 0;
    for (int64_t last = piece - 1; last >= 0; last -= kWarp) {
        uint64_t word = last >= lane ? peek(ties + last - lane) : kAllTies;
        while (!__all_sync(kAllLanes, word != 0)) {
            pause();
            if (word == 0) word = peek(ties + last - lane);
        }
        const unsigned known = __ballot_sync(kAllLanes, word >= kAllTies);
        const int stop = known ? __ffs(known) - 1 : kWarp - 1;
        uint64_t part = lane <= stop ? word & kNumber : 0;
        for (int distance = kWarp / 2; distance; distance /= 2) {
            const uint64_t other = __shfl_down_sync(kAllLanes, part, distance);
            part += lane + distance < kWarp ? other : 0;
        }
        sum += __shfl_sync(kAllLanes, part, 0);
        if (known) break;
    }
    return sum;
}

}  // namespace
}  // namespace fillm
