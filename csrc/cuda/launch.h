// The door between the kernels and the machine that runs them. nvcc compiles them for a GPU; any other compiler gets
// host/cuda_on_host.h instead, which runs the same source on the CPU: how the tests execute it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace fillm {

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // otherwise the next launch would be blamed for it
    throw std::runtime_error(std::string("CUDA ") + what + ": " + cudaGetErrorString(status));
}

// A block's shared memory, all of it dynamic: its size is the last template argument of every kernel, where the launch
// and the compile check (fillm_kernels/cuda_check.py) read it.
template <class T>
__device__ T& block_memory() {
    extern __shared__ __align__(16) unsigned char fillm_block_memory[];
    return *reinterpret_cast<T*>(fillm_block_memory);
}

// Between two looks at memory that another block is to write.
__device__ inline void pause() { __nanosleep(32); }

// The static runtime of this module keeps a current device of its own, beside torch's.
inline void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// Launches `blocks` blocks on a stream, none if there are none.
template <int kShared, class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, uintptr_t stream, Arguments... arguments) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("CUDA launch of more than 2^31 - 1 blocks");
    if (kShared > 48 * 1024)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kShared), "cudaFuncSetAttribute");
    kernel<<<static_cast<unsigned>(blocks), threads, kShared, reinterpret_cast<cudaStream_t>(stream)>>>(
        static_cast<Parameters>(arguments)...);
    check(cudaGetLastError(), "launch");
}

}  // namespace fillm
#else
#include "host/cuda_on_host.h"
#endif

namespace fillm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The same address, of which the compiler knows nothing more: otherwise it takes base and index apart again, and every
// entry costs four 64-bit instructions where one multiplication and addition do.
template <class T>
__device__ inline const T* settled(const T* address) {
#ifdef __CUDA_ARCH__
    asm("" : "+l"(address));
#endif
    return address;
}

}  // namespace fillm
