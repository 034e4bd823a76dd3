// The kernels of ghost_norm, compiled once per instruction set by the ghost_norm_<set>.cpp that includes this file.
//
// Gram form. A register tile holds M x N dot products, each as one vector of partial sums along the features, so rows
// are read as they lie in memory: nothing is transposed or packed. Tiles on the diagonal keep only pairs s <= t.
// Explicit form. A register tile holds M rows x V vectors of G_b and walks over the tokens.
#pragma once

#include <cstring>
#include <type_traits>

#include "ghost_norm.h"
#include "vectors.h"

namespace fillm {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 5, kWideVectors = 4;
#elif defined(__AVX2__)
constexpr int kTile = 3, kWideVectors = 2;
#elif defined(__aarch64__)
constexpr int kTile = 5, kWideVectors = 4;
#else
constexpr int kTile = 3, kWideVectors = 2;
#endif
constexpr int kNarrowTile = 6;

// ---- Gram form ---------------------------------------------------------------------------------------------------

// A chunk of features of some rows: whole vectors at main[r], the remainder padded with zeros to one vector at rest[r].
template <class T>
struct Rows {
    const T* main[kGramRows];
    const T* rest[kGramRows];
};

constexpr int kFeatures = 1024;                // features per chunk: two register tiles' rows stay in the L1 cache
constexpr int kPanelStride = kFeatures + 16;   // off the power of two, so that rows do not share cache sets

template <class T>
struct GramScratch {
    double gram_x[kGramRows * kGramRows];
    double gram_dy[kGramRows * kGramRows];
    Rows<T> a, b;
    alignas(64) T rest[2][kGramRows * VectorOf<T>::width];
    alignas(64) T panel[2][kGramRows * kPanelStride];
};

template <class T, int M, int N, bool DIAGONAL>
void dot_tile(const Rows<T>& rows_a, int i0, const Rows<T>& rows_b, int j0, int vectors, bool remainder, double* gram) {
    constexpr int W = VectorOf<T>::width;
    constexpr int COUNT = DIAGONAL ? M * (M + 1) / 2 : M * N;
    Vector<T> sums[COUNT] = {};
    const T* a[M];
    const T* b[N];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) a[i] = rows_a.main[i0 + i];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) b[j] = rows_b.main[j0 + j];
    auto step = [&](int64_t at) __attribute__((always_inline)) {
        Vector<T> va[M];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) va[i] = load(a[i] + at);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            Vector<T> vb;
            if constexpr (DIAGONAL) vb = va[j];
            else vb = load(b[j] + at);
#pragma GCC unroll 8
            for (int i = DIAGONAL ? j : 0; i < M; ++i) sums[DIAGONAL ? i * (i + 1) / 2 + j : i * N + j] += va[i] * vb;
        }
    };
    for (int k = 0; k < vectors; ++k) step(static_cast<int64_t>(k) * W);
    if (remainder) {
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) a[i] = rows_a.rest[i0 + i];
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) b[j] = rows_b.rest[j0 + j];
        step(0);
    }
    constexpr int FULL = COUNT / W;
    T lanes[(COUNT + W - 1) / W * W];
#pragma GCC unroll 16
    for (int g = 0; g < FULL; ++g) store(lanes + g * W, fold_all<T, W, W / 2>(sums + g * W));
    if constexpr (COUNT % W != 0) store(lanes + FULL * W, fold_all<T, COUNT % W, W / 2>(sums + FULL * W));
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < (DIAGONAL ? i + 1 : N); ++j) {
            int pair = DIAGONAL ? i * (i + 1) / 2 + j : i * N + j;
            gram[i * kGramRows + j] += lanes[pair / W * W + bit_reversed<T>(pair % W)];
        }
    }
}

template <class T>
using DotTile = void (*)(const Rows<T>&, int, const Rows<T>&, int, int, bool, double*);

template <class T>
struct DotTiles {
    DotTile<T> pair[kTile][kTile];
    DotTile<T> diagonal[kTile];

    template <int M, int N>
    constexpr void fill() {
        if constexpr (M <= kTile) {
            pair[M - 1][N - 1] = dot_tile<T, M, N, false>;
            if constexpr (M == N) diagonal[M - 1] = dot_tile<T, M, M, true>;
            if constexpr (N < kTile) fill<M, N + 1>();
            else fill<M + 1, 1>();
        }
    }
    constexpr DotTiles() : pair{}, diagonal{} { fill<1, 1>(); }
};

// Splits `count` rows into tiles of nearly equal size, so that no tile computes pairs that do not exist.
struct Split {
    int tiles, size, larger;  // the first `larger` tiles have one row more than `size`
    explicit Split(int count) : tiles((count + kTile - 1) / kTile), size(count / tiles), larger(count % tiles) {}
    int begin(int tile) const { return tile * size + (tile < larger ? tile : larger); }
};

template <class S, class T>
void gather(const Matrix& matrix, const int64_t* list, int count, int64_t begin, int features, T* panel, T* rest,
            Rows<T>& rows) {
    constexpr int W = VectorOf<T>::width;
    const int whole = features / W * W, left = features - whole;
    for (int r = 0; r < count; ++r) {
        const S* from = static_cast<const S*>(matrix.data) + list[r] * matrix.stride + begin;
        const T* start;
        if constexpr (std::is_same_v<S, T>) {
            start = from;
        } else {
            start = panel + static_cast<int64_t>(r) * kPanelStride;
            widen_row(from, features, panel + static_cast<int64_t>(r) * kPanelStride);
        }
        rows.main[r] = start;
        rows.rest[r] = rest + r * W;
        if (left) {
            for (int k = 0; k < W; ++k) rest[r * W + k] = k < left ? start[whole + k] : T(0);
        }
    }
}

template <class S, class T>
void gram_of(const Matrix& matrix, const GramTask& task, double* gram, GramScratch<T>& scratch) {
    static constexpr DotTiles<T> tiles{};
    constexpr int W = VectorOf<T>::width;
    std::memset(gram, 0, sizeof scratch.gram_x);
    const Split split_a(task.count_a), split_b(task.count_b);
    for (int64_t begin = 0; begin < matrix.columns; begin += kFeatures) {
        const int64_t ahead = matrix.columns - begin;
        const int features = static_cast<int>(ahead < kFeatures ? ahead : kFeatures);
        gather<S>(matrix, task.a, task.count_a, begin, features, scratch.panel[0], scratch.rest[0], scratch.a);
        if (!task.diagonal)
            gather<S>(matrix, task.b, task.count_b, begin, features, scratch.panel[1], scratch.rest[1], scratch.b);
        const Rows<T>& other = task.diagonal ? scratch.a : scratch.b;
        const int vectors = features / W;
        const bool remainder = features % W != 0;
        for (int p = 0; p < split_a.tiles; ++p) {
            const int i0 = split_a.begin(p), m = split_a.begin(p + 1) - i0;
            const int end = task.diagonal ? p : split_b.tiles;
            double* row = gram + static_cast<int64_t>(i0) * kGramRows;
            for (int q = 0; q < end; ++q) {
                const int j0 = split_b.begin(q), n = split_b.begin(q + 1) - j0;
                tiles.pair[m - 1][n - 1](scratch.a, i0, other, j0, vectors, remainder, row + j0);
            }
            if (task.diagonal) tiles.diagonal[m - 1](scratch.a, i0, other, i0, vectors, remainder, row + i0);
        }
    }
}

template <class S>
double gram(const GramTask& task, void* memory) {
    using T = typename Computes<S>::type;
    GramScratch<T>& scratch = *static_cast<GramScratch<T>*>(memory);
    gram_of<S, T>(task.x, task, scratch.gram_x, scratch);
    gram_of<S, T>(task.dy, task, scratch.gram_dy, scratch);
    double total = 0, diagonal = 0;
    for (int i = 0; i < task.count_a; ++i) {
        const double* gx = scratch.gram_x + i * kGramRows;
        const double* gdy = scratch.gram_dy + i * kGramRows;
        const int end = task.diagonal ? i : task.count_b;
        for (int j = 0; j < end; ++j) total += gx[j] * gdy[j];
        if (task.diagonal) diagonal += gx[i] * gdy[i];
    }
    return 2 * total + diagonal;
}

// ---- explicit form -----------------------------------------------------------------------------------------------

constexpr int kTokens = 512;  // tokens per packed panel

template <class T>
struct ExplicitScratch {
    static constexpr int columns = kWideVectors * VectorOf<T>::width;
    alignas(64) T wide[kTokens * columns];
    alignas(64) T narrow[kTokens * kNarrowBlock];
    alignas(64) T gradient[kNarrowBlock * columns];
};

// gradient [M, columns] += narrow[:, at : at + M]^T wide, over `tokens` packed tokens. Their sum is taken apart: one
// running sum over all tokens of a long sample would lose its digits.
template <class T, int M>
void outer_tile(const T* narrow, const T* wide, int tokens, T* gradient) {
    constexpr int W = VectorOf<T>::width, V = kWideVectors;
    Vector<T> sums[M][V] = {};
    for (int t = 0; t < tokens; ++t) {
        Vector<T> row[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) row[j] = load(wide + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const T value = narrow[i];
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) sums[i][j] += row[j] * value;
        }
        wide += V * W;
        narrow += kNarrowBlock;
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) {
            T* entries = gradient + (i * V + j) * W;
            store(entries, load(entries) + sums[i][j]);
        }
}

template <class S, class T>
void pack(const Matrix& matrix, const int64_t* rows, int tokens, int64_t begin, int used, int width, T* panel) {
    for (int t = 0; t < tokens; ++t, panel += width) {
        widen_row(static_cast<const S*>(matrix.data) + rows[t] * matrix.stride + begin, used, panel);
        for (int k = used; k < width; ++k) panel[k] = T(0);
    }
}

template <class S>
double explicit_form(const ExplicitTask& task, void* memory) {
    using T = typename Computes<S>::type;
    using Scratch = ExplicitScratch<T>;
    using OuterTile = void (*)(const T*, const T*, int, T*);
    static constexpr OuterTile tiles[kNarrowTile] = {outer_tile<T, 1>, outer_tile<T, 2>, outer_tile<T, 3>,
                                                     outer_tile<T, 4>, outer_tile<T, 5>, outer_tile<T, 6>};
    Scratch& scratch = *static_cast<Scratch*>(memory);
    const int narrow = static_cast<int>(task.narrow_end - task.narrow_begin);
    const int count = (narrow + kNarrowTile - 1) / kNarrowTile;
    const bool once = task.count <= kTokens;  // then the narrow panel serves every block of the wide side
    double total = 0;
    for (int64_t begin = task.wide_begin; begin < task.wide_end; begin += Scratch::columns) {
        const int64_t ahead = task.wide_end - begin;
        const int used = static_cast<int>(ahead < Scratch::columns ? ahead : Scratch::columns);
        std::memset(scratch.gradient, 0, sizeof(T) * static_cast<size_t>(narrow) * Scratch::columns);
        for (int64_t first = 0; first < task.count; first += kTokens) {
            const int64_t remaining = task.count - first;
            const int tokens = static_cast<int>(remaining < kTokens ? remaining : kTokens);
            pack<S>(task.wide, task.rows + first, tokens, begin, used, Scratch::columns, scratch.wide);
            if (!once || begin == task.wide_begin)
                pack<S>(task.narrow, task.rows + first, tokens, task.narrow_begin, narrow, kNarrowBlock, scratch.narrow);
            for (int p = 0; p < count; ++p) {
                const int at = p * narrow / count, size = (p + 1) * narrow / count - at;
                tiles[size - 1](scratch.narrow + at, scratch.wide, tokens, scratch.gradient + at * Scratch::columns);
            }
        }
        for (int i = 0; i < narrow; ++i) {
            double row = 0;  // short sums of sums: a single running one would lose digits of a float64 result
            for (int j = 0; j < Scratch::columns; ++j) {
                const double entry = scratch.gradient[i * Scratch::columns + j];
                row += entry * entry;
            }
            total += row;
        }
    }
    return total;
}

template <class S>
constexpr Kernels kernels_for() {
    using T = typename Computes<S>::type;
    constexpr size_t one = sizeof(GramScratch<T>), other = sizeof(ExplicitScratch<T>);
    return {gram<S>, explicit_form<S>, one > other ? one : other};
}

constexpr Kernels kKernels[kDtypes] = {kernels_for<float>(), kernels_for<double>(), kernels_for<BFloat16>(),
                                       kernels_for<Float16>()};

}  // namespace
}  // namespace fillm
