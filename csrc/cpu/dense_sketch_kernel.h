// The kernels of dense sketches, compiled once per instruction set by the dense_sketch_<set>.cpp that includes this file.
//
// Loops over columns are written for the compiler to vectorise. A Gaussian pair costs two hashes, and Box-Muller on
// exact arguments: 24 bits of an angle leave a multiple of 2^-24 of a turn in its quadrant, and 23 bits of a radius a
// significand and an exponent, so that short series are good to a few roundings.
#pragma once

#include "dense_sketch.h"
#include "seed_law.h"
#include "sketch.h"
#include "vectors.h"

namespace fillm {
namespace {

// ---- entries ---------------------------------------------------------------------------------------------------------

// sum_k coefficients[k] x^k
template <class T, int K>
inline T series(const T (&coefficients)[K], T x) {
    T sum = coefficients[K - 1];
    for (int k = K - 2; k >= 0; --k) sum = sum * x + coefficients[k];
    return sum;
}

// What is cut off is below a quarter of a rounding: s^2 < 0.0295 in the logarithm, x^2 < 0.617 in the others.
template <class T>
struct Series {
    static constexpr int kLog = sizeof(T) == 4 ? 5 : 11, kCircle = sizeof(T) == 4 ? 6 : 10;
    T log[kLog];                       // atanh(s) / s in s^2
    T cosine[kCircle], sine[kCircle];  // cos x and sin(x) / x in x^2
    constexpr Series() : log{}, cosine{}, sine{} {
        for (int k = 0; k < kLog; ++k) log[k] = static_cast<T>(1.0 / (2 * k + 1));
        double factor = 1;
        for (int k = 0; k < kCircle; ++k) {
            cosine[k] = static_cast<T>(factor);
            sine[k] = static_cast<T>(factor / (2 * k + 1));
            factor /= -(2.0 * k + 1) * (2 * k + 2);
        }
    }
};
template <class T>
constexpr Series<T> kSeries{};

// sqrt(-2 ln((word + 1/2) / 2^23)) for word < 2^23.
template <class T>
inline T radius_of(uint32_t word) {
    const float uniform = (static_cast<float>(static_cast<int32_t>(word)) + 0.5f) * 0x1p-23f;
    int32_t bits;
    __builtin_memcpy(&bits, &uniform, sizeof bits);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of the power of two that leaves [sqrt(1/2), sqrt(2))
    bits -= exponent * (1 << 23);
    float significand;
    __builtin_memcpy(&significand, &bits, sizeof significand);
    const T over = static_cast<T>(significand) - 1, s = over / (over + 2);
    const T logarithm = static_cast<T>(exponent) * static_cast<T>(0.69314718055994530942) +
                        2 * s * series(kSeries<T>.log, s * s);
    if constexpr (sizeof(T) == 4) return __builtin_sqrtf(-2 * logarithm);
    else return __builtin_sqrt(-2 * logarithm);
}

// Cosine and sine of `word` / 2^24 of a turn, word < 2^24.
template <class T>
inline void circle(uint32_t word, T& cosine, T& sine) {
    const int32_t quadrant = static_cast<int32_t>((word + (1u << 21)) >> 22);  // 0 .. 4
    const int32_t rest = static_cast<int32_t>(word) - quadrant * (1 << 22);
    const T x = static_cast<T>(rest) * static_cast<T>(6.28318530717958647693 * 0x1p-24), square = x * x;
    const T c = series(kSeries<T>.cosine, square), s = x * series(kSeries<T>.sine, square);
    cosine = (quadrant & 1 ? s : c) * static_cast<T>(1 - ((quadrant + 1) & 2));
    sine = (quadrant & 1 ? c : s) * static_cast<T>(1 - (quadrant & 2));
}

template <class T>
void gaussian_tile(const DenseTile& tile) {
    const Key keys[2] = {key_of(tile.map.seed, kGaussian, kRadius, 0), key_of(tile.map.seed, kGaussian, kAngle, 0)};
    uint32_t first[2][kTileCoordinates], second[2][kTileCoordinates];
    for (int j = 0; j < 2; ++j) {
        for (int64_t q = 0; q < tile.count; ++q) {
            const Key state = state_of(keys[j], tile.coordinates[q]);
            first[j][q] = state.first;
            second[j][q] = state.second;
        }
    }
    const int64_t pairs = tile.columns / 2;
    const uint32_t from = static_cast<uint32_t>(tile.column / 2);
    T* entries = static_cast<T*>(tile.entries);
    for (int64_t q = 0; q < tile.count; ++q, entries += kTileColumns) {
        const Key radius{first[0][q], second[0][q]}, angle{first[1][q], second[1][q]};
        for (int64_t p = 0; p < pairs; ++p) {
            const uint32_t column = from + static_cast<uint32_t>(p);
            const T length = radius_of<T>(cell(radius, column) >> 9);
            T cosine, sine;
            circle<T>(cell(angle, column) >> 8, cosine, sine);
            entries[2 * p] = length * cosine;
            entries[2 * p + 1] = length * sine;
        }
    }
}

template <class T>
void rademacher_tile(const DenseTile& tile) {
    const Key key = key_of(tile.map.seed, kRademacher, kSign, 0);
    uint32_t words[kTileColumns];
    T* entries = static_cast<T*>(tile.entries);
    for (int64_t q = 0; q < tile.count; ++q, entries += kTileColumns) {
        const uint64_t index = tile.coordinates[q];
        if (q == 0 || index / kSigns != tile.coordinates[q - 1] / kSigns) {
            const Key state = state_of(key, index / kSigns);
            for (int64_t c = 0; c < tile.columns; ++c) words[c] = cell(state, static_cast<uint32_t>(tile.column + c));
        }
        const int bit = static_cast<int>(index % kSigns);
        for (int64_t c = 0; c < tile.columns; ++c)
            entries[c] = static_cast<T>(1 - 2 * static_cast<int32_t>(words[c] >> bit & 1u));
    }
}

template <class T>
void make_tile(const DenseTile& tile) {
    (tile.map.kind == kGaussian ? gaussian_tile<T> : rademacher_tile<T>)(tile);
}

// ---- products --------------------------------------------------------------------------------------------------------

// Rows at a time: with two vectors of columns, as many sums as registers hold beside the entries.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kProductRows = 8;
#else
constexpr int kProductRows = 4;
#endif

// Two vectors of columns of R rows; one fused multiplication and addition after the other, whatever R is.
template <class T, int R>
inline void add_rows(const T* values, int64_t stride, const T* entries, int64_t count, T* sums) {
    constexpr int W = VectorOf<T>::width;
    Vector<T> own[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) own[r][j] = load(sums + r * kTileColumns + j * W);
    for (int64_t q = 0; q < count; ++q, entries += kTileColumns) {
        const Vector<T> left = load(entries), right = load(entries + W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const T value = values[r * stride + q];
            own[r][0] += left * value;
            own[r][1] += right * value;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) store(sums + r * kTileColumns + j * W, own[r][j]);
}

template <class T, int R = kProductRows>
inline void add_all(const T* values, int64_t stride, int64_t rows, const T* entries, int64_t count, T* sums) {
    for (; rows >= R; rows -= R, values += R * stride, sums += R * kTileColumns)
        add_rows<T, R>(values, stride, entries, count, sums);
    if constexpr (R > 1) add_all<T, R / 2>(values, stride, rows, entries, count, sums);
}

template <class S>
void add_product(const DenseTile& tile, const DenseProduct& product) {
    using T = typename Computes<S>::type;
    const S* source = static_cast<const S*>(product.values);
    const T* values;
    int64_t stride = product.stride;
    if constexpr (sizeof(S) < sizeof(T)) {
        T* widened = static_cast<T*>(product.widened);
        for (int64_t r = 0; r < product.rows; ++r)
            widen_row(source + r * stride, tile.count, widened + r * kTileCoordinates);
        values = widened;
        stride = kTileCoordinates;
    } else {
        values = source;
    }
    for (int64_t column = 0; column < tile.columns; column += 2 * VectorOf<T>::width)
        add_all<T>(values, stride, product.rows, static_cast<const T*>(tile.entries) + column, tile.count,
                   static_cast<T*>(product.sums) + column);
}

template <class S>
constexpr DenseKernels dense_for() {
    using T = typename Computes<S>::type;
    return {VectorOf<T>::width, make_tile<T>, add_product<S>};
}

constexpr DenseKernels kDenseKernels[kDtypes] = {dense_for<float>(), dense_for<double>(), dense_for<BFloat16>(),
                                                 dense_for<Float16>()};

}  // namespace
}  // namespace fillm
