// A vector of values read from any element type, widened in registers.
#pragma once

#include "vectors.h"

namespace fillm {
namespace {

inline Vector<float> load_wide(const float* p) { return load(p); }
inline Vector<double> load_wide(const double* p) { return load(p); }

inline Vector<float> load_wide(const BFloat16* p) {
    constexpr int W = VectorOf<float>::width;
    typedef uint16_t Narrow __attribute__((vector_size(2 * W), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(4 * W)));
    const Wide bits = __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide) << 16;
    return reinterpret_cast<Vector<float>>(bits);
}

inline Vector<float> load_wide(const Float16* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Vector<float> wide;
    for (int l = 0; l < VectorOf<float>::width; ++l) wide[l] = widen(p[l]);
    return wide;
#endif
}

}  // namespace
}  // namespace fillm
