// The words of CUDA C++ that the kernels use, for a C++ compiler: what launch.h includes where there is no nvcc.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (::fillm::host::thread_index())
#define blockIdx (::fillm::host::block_index())
#define blockDim (::fillm::host::machine.threads)
#define gridDim (::fillm::host::machine.blocks)

namespace fillm::host {

inline Index thread_index() { return {static_cast<unsigned>(machine.now().thread), 0, 0}; }
inline Index block_index() { return {machine.now().block->index, 0, 0}; }

// The kernels exchange with all lanes of a warp only; another mask would need another machine.
inline void whole_warp(unsigned lanes) {
    if (lanes != 0xffffffffu) throw std::logic_error("exchanges take all lanes of a warp");
}

}  // namespace fillm::host

inline void __syncthreads() {
    auto& machine = fillm::host::machine;
    machine.arrive(machine.now().block->barrier, static_cast<int>(machine.threads.x));
}

template <class T>
T __shfl_sync(unsigned lanes, T value, int from) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    fillm::host::whole_warp(lanes);
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    word = fillm::host::machine.exchange(word, from & 31);
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <class T>
T __shfl_up_sync(unsigned lanes, T value, unsigned distance) {
    const int lane = fillm::host::machine.now().thread % 32;
    return __shfl_sync(lanes, value, lane < static_cast<int>(distance) ? lane : lane - static_cast<int>(distance));
}

template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned distance) {
    const int lane = fillm::host::machine.now().thread % 32;
    return __shfl_sync(lanes, value, lane + static_cast<int>(distance) > 31 ? lane : lane + static_cast<int>(distance));
}

inline unsigned __ballot_sync(unsigned lanes, int predicate) {
    fillm::host::whole_warp(lanes);
    const uint64_t* votes = fillm::host::machine.gather(predicate != 0);
    unsigned word = 0;
    for (int lane = 0; lane < 32; ++lane) word |= static_cast<unsigned>(votes[lane]) << lane;
    return word;
}

inline int __all_sync(unsigned lanes, int predicate) { return __ballot_sync(lanes, predicate) == 0xffffffffu; }

inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(unsigned word) { return __builtin_ffs(static_cast<int>(word)); }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline long long __double_as_longlong(double value) {
    long long bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
T __ldg(const T* where) {
    return *where;
}

// One CPU thread runs all fibers, and none is interrupted: plain operations are atomic.
template <class T, class V>
T atomicAdd(T* where, V value) {
    const T old = *where;
    *where = old + static_cast<T>(value);
    return old;
}

template <class T, class V>
T atomicMin(T* where, V value) {
    const T old = *where;
    *where = std::min(old, static_cast<T>(value));
    return old;
}

namespace fillm {

template <class T>
T& block_memory() {
    return *reinterpret_cast<T*>(host::machine.now().block->memory.data());
}

inline void pause() { host::machine.yield(); }
inline void use_device(int) {}
inline int multiprocessors() { return host::machine.settings.multiprocessors; }

template <int kShared, class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, uintptr_t, Arguments... arguments) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("CUDA launch of more than 2^31 - 1 blocks");
    host::machine.run(blocks, threads, kShared, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace fillm
