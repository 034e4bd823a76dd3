// Kernels with a fault each, which the tests' machine must find: what it finds in no other kernel means something then.
#pragma once

#include "../launch.h"

namespace fillm::host {

template <int kShared>
__global__ void reversed(const int* from, int* to, bool with_barrier) {
    int* slots = block_memory<int[64]>();
    slots[threadIdx.x] = from[threadIdx.x];
    if (with_barrier) __syncthreads();
    to[threadIdx.x] = slots[63 - threadIdx.x];
}

// Threads from `end` on never come to the barrier.
template <int kShared>
__global__ void waiting(unsigned end) {
    if (threadIdx.x < end) __syncthreads();
}

inline void run_reversed(uintptr_t from, uintptr_t to, bool with_barrier) {
    launch<64 * sizeof(int)>(reversed<64 * sizeof(int)>, 1, 64, 0, reinterpret_cast<const int*>(from),
                             reinterpret_cast<int*>(to), with_barrier);
}

inline void run_waiting(unsigned end) { launch<0>(waiting<0>, 2, 64, 0, end); }

}  // namespace fillm::host
