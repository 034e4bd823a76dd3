// Element types as they lie in memory, and the way from them to the type sums are in.
#pragma once

#include <cstring>

#include "../cpu/types.h"
#include "launch.h"

namespace fillm {

// The bits of an element as the kernels load them. `Wide` is what they add in.
struct Float32Bits {
    using Wide = float;
    float stored;
};
struct Float64Bits {
    using Wide = double;
    double stored;
};
struct BFloat16Bits {
    using Wide = float;
    uint16_t stored;
};
struct Float16Bits {
    using Wide = float;
    uint16_t stored;
};

// A load of memory that nobody writes meanwhile.
template <class S>
__device__ inline S read(const S* element) {
    return {__ldg(&element->stored)};
}

__device__ inline float widen(Float32Bits element) { return element.stored; }
__device__ inline double widen(Float64Bits element) { return element.stored; }
__device__ inline float widen(BFloat16Bits element) {
    return __uint_as_float(static_cast<uint32_t>(element.stored) << 16);
}

// Without cuda_fp16.h, which takes as long to compile as all kernels.
__device__ inline float widen(Float16Bits element) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(element.stored));
    return value;
#else
    // The exponent's bias goes from 15 to 127 by a product, which is exact and right for subnormal numbers too.
    const uint32_t magnitude = element.stored & 0x7fffu;
    const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;
    const uint32_t bits = magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : __float_as_uint(scaled);
    return __uint_as_float(bits | (element.stored & 0x8000u) << 16);
#endif
}

// The number with its sign changed if bit 31 of `flip` is set.
__device__ inline float flipped(float value, uint32_t flip) {
    return __uint_as_float(__float_as_uint(value) ^ (flip & 0x80000000u));
}
__device__ inline double flipped(double value, uint32_t flip) {
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value));
    return __longlong_as_double(static_cast<long long>(bits ^ static_cast<uint64_t>(flip & 0x80000000u) << 32));
}

}  // namespace fillm
