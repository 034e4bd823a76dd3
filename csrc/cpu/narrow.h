// The way back from float to narrow element types: to the nearest, ties to even.
#pragma once

#include "vectors.h"

namespace fillm {
namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline void narrow(float value, BFloat16& to) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = static_cast<uint16_t>(nan ? (bits >> 16 | 0x40u) : rounded);
}

inline void narrow(float value, Float16& to) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and more: nearer to 2^16 than to the largest, 65504
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal number
        const uint32_t shifted = magnitude - (112u << 23);  // exponent bias 127 -> 15
        half = (shifted + 0xfffu + (shifted >> 13 & 1u)) >> 13;
    } else {
        float small;  // adding 1/2 leaves the subnormal's bits, rounded, at the end of the significand
        std::memcpy(&small, &magnitude, sizeof small);
        half = bits_of(small + 0.5f) - bits_of(0.5f);
    }
    to.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

inline void narrow(float value, float& to) { to = value; }
inline void narrow(double value, double& to) { to = value; }

}  // namespace
}  // namespace fillm
