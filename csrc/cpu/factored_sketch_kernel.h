// The kernels of factored_sketch, compiled once per instruction set by the factored_sketch_<set>.cpp that includes this
// file.
//
// A side's bins are few, so neighbouring coordinates fall on bins too close together for a vector along them. The lanes
// are rows instead: tiles are transposed in registers, and every coordinate of a whole vector of rows is added to its
// bins, a vector each. What a row adds up does not depend on the rows beside it.
#pragma once

#include <cstring>

#include "factored_sketch.h"
#include "vectors.h"

namespace fillm {
namespace {

// Lanes of a and b after one step of a transposition: `high` says whether the upper rows of the pair are made.
template <class T, int H, bool HIGH>
inline Vector<T> exchange(Vector<T> a, Vector<T> b) {
    constexpr int W = VectorOf<T>::width;
    typename VectorOf<T>::index from;
    for (int l = 0; l < W; ++l) from[l] = HIGH ? (l & H ? W + l : l + H) : (l & H ? W + l - H : l);
#ifdef __clang__
    Vector<T> out;
    for (int l = 0; l < W; ++l) out[l] = from[l] < W ? a[from[l]] : b[from[l] - W];
    return out;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// Transposes v[W][W] in place.
template <class T, int H = 1>
inline void transpose(Vector<T>* v) {
    constexpr int W = VectorOf<T>::width;
    if constexpr (H < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            if (i & H) continue;
            const Vector<T> a = v[i], b = v[i + H];
            v[i] = exchange<T, H, false>(a, b);
            v[i + H] = exchange<T, H, true>(a, b);
        }
        transpose<T, 2 * H>(v);
    }
}

template <class T>
inline Vector<T> flipped(Vector<T> value, uint32_t sign) {
    using Index = typename VectorOf<T>::index;
    using Lane = typename VectorOf<T>::Lane;
    const Lane bits = sizeof(T) == 4 ? static_cast<Lane>(sign) : static_cast<Lane>(static_cast<uint64_t>(sign) << 32);
    return reinterpret_cast<Vector<T>>(reinterpret_cast<Index>(value) ^ (Index{} + bits));
}

// Columns [first, first + count) of up to W rows as count vectors of rows, zeros for rows that are missing.
template <class S, class T>
inline void load_columns(const ProjectTask& task, int64_t first, int64_t count, Vector<T>* v) {
    constexpr int W = VectorOf<T>::width;
    const S* source = static_cast<const S*>(task.rows) + first;
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
        if (r >= task.count) {
            v[r] = Vector<T>{};
        } else if (std::is_same_v<S, T> && count == W) {
            v[r] = load(reinterpret_cast<const T*>(source + r * task.stride));
        } else {
            T row[W] = {};
            widen_row(source + r * task.stride, count, row);
            v[r] = load(row);
        }
    }
    transpose<T>(v);
}

template <class S>
void project(const ProjectTask& task) {
    using T = typename Computes<S>::type;
    constexpr int W = VectorOf<T>::width;
    T* bins = static_cast<T*>(task.bins);
    std::memset(bins, 0, static_cast<size_t>(task.padded * W) * sizeof(T));
    const Placement* place = task.placements;
    Vector<T> v[W];
    for (int64_t first = 0; first < task.width; first += W) {
        const int64_t count = task.width - first < W ? task.width - first : W;
        load_columns<S, T>(task, first, count, v);
        for (int64_t c = 0; c < count; ++c) {
            for (int64_t z = 0; z < task.nonzeros; ++z, ++place) {
                T* bin = bins + static_cast<int64_t>(place->bin) * W;
                store(bin, load(bin) + flipped<T>(v[c], place->sign));
            }
        }
    }
    const T scale = static_cast<T>(task.scale);
    for (int64_t first = 0; first < task.padded; first += W) {
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) v[l] = load(bins + (first + l) * W) * scale;
        transpose<T>(v);
        for (int64_t r = 0; r < task.count; ++r) store(static_cast<T*>(task.out) + r * task.padded + first, v[r]);
    }
}

// A tile of 8 rows by kSidePad columns, added up token by token.
template <class S>
void multiply(const ProductTask& task) {
    using T = typename Computes<S>::type;
    constexpr int W = VectorOf<T>::width, C = static_cast<int>(kSidePad) / W, R = 8;
    for (int64_t row = 0; row < task.rows; row += R) {
        const int64_t rows = task.rows - row < R ? task.rows - row : R;
        for (int64_t column = 0; column < task.columns; column += kSidePad) {
            const int64_t columns = task.columns - column < kSidePad ? task.columns - column : kSidePad;
            T tile[R][kSidePad] = {};
            T* out = static_cast<T*>(task.out) + row * task.columns + column;
            for (int64_t r = 0; r < rows; ++r)
                std::memcpy(tile[r], out + r * task.columns, static_cast<size_t>(columns) * sizeof(T));
            Vector<T> sums[R][C];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) sums[r][c] = load(tile[r] + c * W);
            const T* left = static_cast<const T*>(task.left) + row;
            const T* right = static_cast<const T*>(task.right) + column;
            for (int64_t t = 0; t < task.tokens; ++t, left += task.left_stride, right += task.right_stride) {
                Vector<T> across[C];
                for (int c = 0; c < C; ++c) across[c] = load(right + c * W);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) sums[r][c] += across[c] * left[r];
            }
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) store(tile[r] + c * W, sums[r][c]);
            for (int64_t r = 0; r < rows; ++r)
                std::memcpy(out + r * task.columns, tile[r], static_cast<size_t>(columns) * sizeof(T));
        }
    }
}

// Lanes are samples: an entry's bin is the same for all of them.
template <class T>
void fold(const FoldTask& task) {
    constexpr int W = VectorOf<T>::width;
    Vector<T> v[W];
    for (int64_t r = 0; r < task.rows; ++r) {
        const ProjectTask row{static_cast<const T*>(task.values) + r * task.columns, task.stride, task.columns,
                              task.samples, nullptr, 0, 0, 1.0, nullptr, nullptr};
        for (int64_t first = 0; first < task.columns; first += W) {
            const int64_t count = task.columns - first < W ? task.columns - first : W;
            load_columns<T, T>(row, first, count, v);
            for (int64_t m = 0; m < task.maps; ++m) {
                const Placement output = task.outputs[m * task.outputs_stride + r];
                const Placement* inputs = task.inputs + m * task.inputs_stride + first;
                T* bins = static_cast<T*>(task.bins) + (m * 2 * task.dim + output.bin) * W;
                for (int64_t c = 0; c < count; ++c) {
                    T* bin = bins + static_cast<int64_t>(inputs[c].bin) * W;
                    store(bin, load(bin) + flipped<T>(v[c], inputs[c].sign ^ output.sign));
                }
            }
        }
    }
}

// Sums of the parts modulo k, lanes turned into rows.
template <class T>
void unfold(const UnfoldTask& task) {
    constexpr int W = VectorOf<T>::width;
    const T* bins = static_cast<const T*>(task.bins);
    Vector<T> v[W];
    for (int64_t first = 0; first < task.dim; first += W) {
        const int64_t count = task.dim - first < W ? task.dim - first : W;
        for (int64_t k = 0; k < W; ++k) {
            v[k] = Vector<T>{};
            for (int64_t part = 0; k < count && part < 2 * task.parts; ++part)
                v[k] += load(bins + (part / 2 * task.part_stride + part % 2 * task.dim * W) + (first + k) * W);
        }
        transpose<T>(v);
        for (int64_t s = 0; s < task.samples; ++s) {
            T row[W];
            store(row, v[s]);
            std::memcpy(static_cast<T*>(task.out) + s * task.out_stride + first, row,
                        static_cast<size_t>(count) * sizeof(T));
        }
    }
}

template <class S>
constexpr FactoredKernels factored_for() {
    using T = typename Computes<S>::type;
    return {VectorOf<T>::width, project<S>, multiply<S>, fold<T>, unfold<T>};
}

constexpr FactoredKernels kFactoredKernels[kDtypes] = {factored_for<float>(), factored_for<double>(),
                                                       factored_for<BFloat16>(), factored_for<Float16>()};

}  // namespace
}  // namespace fillm
