// Vectors, element types and sums across lanes, for whichever instruction set includes this file.
//
// Everything lies in an unnamed namespace and uses no standard library templates: an inline function compiled with wide
// registers must never be the copy that the linker picks for processors without them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fillm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
    static constexpr int width = kVectorBytes / static_cast<int>(sizeof(T));
    using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef T type __attribute__((vector_size(kVectorBytes)));
    typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
    typedef Lane index __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
inline Vector<T> load(const T* p) {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
inline void store(T* p, Vector<T> v) {
    *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

// ---- element types -----------------------------------------------------------------------------------------------

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class S>
struct Computes {
    using type = float;
};
template <>
struct Computes<double> {
    using type = double;
};

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(BFloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline float widen(Float16 value) {
    uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    uint32_t magnitude = value.bits & 0x7fffu;
    uint32_t bits;
    if (magnitude >= 0x7c00u) {
        bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;  // infinity or NaN
    } else if (magnitude >= 0x0400u) {
        bits = (magnitude << 13) + (112u << 23);          // exponent bias 15 -> 127
    } else {
        float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
        std::memcpy(&bits, &subnormal, sizeof bits);
    }
    bits |= sign;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <class S>
inline void widen_row(const S* from, int64_t count, typename Computes<S>::type* to) {
    if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
        std::memcpy(to, from, static_cast<size_t>(count) * sizeof(S));
    } else {
        int64_t k = 0;
#ifdef __F16C__
        if constexpr (std::is_same_v<S, Float16>) {
            for (; k + 8 <= count; k += 8) {
                __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
                _mm256_storeu_ps(to + k, _mm256_cvtph_ps(half));
            }
        }
#endif
        for (; k < count; ++k) to[k] = widen(from[k]);
    }
}

// ---- sums across lanes -------------------------------------------------------------------------------------------

// Lane l of the result: the sum of two lanes of `a` where l % 2G < G, of `b` elsewhere.
template <class T, int G>
inline Vector<T> fold(Vector<T> a, Vector<T> b) {
    constexpr int W = VectorOf<T>::width;
    typename VectorOf<T>::index low, high;
    for (int l = 0; l < W; ++l) {
        int group = l / (2 * G) * 2 * G, within = l % (2 * G);
        low[l] = within < G ? group + within : W + group + within - G;
        high[l] = low[l] + G;
    }
#ifdef __clang__
    Vector<T> left, right;
    for (int l = 0; l < W; ++l) {
        left[l] = low[l] < W ? a[low[l]] : b[low[l] - W];
        right[l] = high[l] < W ? a[high[l]] : b[high[l] - W];
    }
    return left + right;
#else
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// Sums of the COUNT <= W vectors at v; the sum of vector i ends in lane bit_reversed(i).
template <class T, int COUNT, int G>
inline Vector<T> fold_all(const Vector<T>* v) {
    if constexpr (G == 0) {
        return v[0];
    } else {
        constexpr int HALF = (COUNT + 1) / 2;
        Vector<T> folded[HALF];
#pragma GCC unroll 16
        for (int i = 0; i < HALF; ++i) folded[i] = fold<T, G>(v[2 * i], v[2 * i + 1 < COUNT ? 2 * i + 1 : 2 * i]);
        return fold_all<T, HALF, G / 2>(folded);
    }
}

template <class T>
constexpr int bit_reversed(int i) {
    int lane = 0;
    for (int bit = 1, mirror = VectorOf<T>::width / 2; mirror > 0; bit *= 2, mirror /= 2)
        if (i & bit) lane += mirror;
    return lane;
}

}  // namespace
}  // namespace fillm
