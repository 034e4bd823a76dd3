// Packing, register tiles and what becomes of them, compiled once per instruction set by matmul_<set>.cpp.
#pragma once

#include "matmul.h"
#include "vectors.h"

namespace fillm {
namespace {

// Accumulators fill the register file but for the vectors of `b` and one broadcast entry of `a`.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelRows = 14, kPanelVectors = 2;
#else
constexpr int kPanelRows = 6, kPanelVectors = 2;
#endif
template <class T>
constexpr int kPanelColumns = kPanelVectors* VectorOf<T>::width;

template <class T, class S>
inline T read(const S* p) {
    if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) return static_cast<T>(*p);
    else return static_cast<T>(widen(*p));
}

// panel[k][WIDTH] = source(i, k) for lanes i = first .. first + WIDTH - 1, zeros from `count` on.
template <class T, int WIDTH, class S>
void pack(const S* source, int64_t lane_stride, int64_t k_stride, const int64_t* lanes, int64_t first, int64_t count,
          const int64_t* k_rows, const double* k_scale, int64_t k_begin, int64_t k_end, T* panel) {
    const int used = static_cast<int>(count - first < WIDTH ? count - first : WIDTH);
    const S* start[WIDTH];
    for (int i = 0; i < WIDTH; ++i) {
        const int64_t lane = first + (i < used ? i : 0);
        start[i] = source + (lanes ? lanes[lane] : lane) * lane_stride;
    }
    const bool contiguous = lane_stride == 1 && !lanes && used == WIDTH;
    for (int64_t k = k_begin; k < k_end; ++k, panel += WIDTH) {
        const int64_t row = k_rows ? k_rows[k] : k, at = row * k_stride;
        if (contiguous) {
            const S* from = start[0] + at;
            for (int i = 0; i < WIDTH; ++i) panel[i] = read<T>(from + i);
        } else {
            for (int i = 0; i < WIDTH; ++i) panel[i] = read<T>(start[i] + at);
            for (int i = used; i < WIDTH; ++i) panel[i] = T(0);
        }
        if (k_scale) {
            const T factor = static_cast<T>(k_scale[row]);
            for (int i = 0; i < WIDTH; ++i) panel[i] *= factor;
        }
    }
}

template <class Body>
void with_type(const Operand& operand, const Body& body) {
    switch (operand.dtype) {
        case kFloat32: return body(static_cast<const float*>(operand.data));
        case kFloat64: return body(static_cast<const double*>(operand.data));
        case kBFloat16: return body(static_cast<const BFloat16*>(operand.data));
        default: return body(static_cast<const Float16*>(operand.data));
    }
}

template <class T>
void pack_a(const MatmulArguments& g, int64_t m, int64_t k_begin, int64_t k_end, void* panel) {
    with_type(g.a, [&](auto* source) {
        pack<T, kPanelRows>(source, g.a.row_stride, g.a.column_stride, g.m_rows, m, g.m, g.k_rows, g.k_scale, k_begin,
                            k_end, static_cast<T*>(panel));
    });
}

template <class T>
void pack_b(const MatmulArguments& g, int64_t n, int64_t k_begin, int64_t k_end, void* panel) {
    with_type(g.b, [&](auto* source) {
        pack<T, kPanelColumns<T>>(source, g.b.column_stride, g.b.row_stride, nullptr, n, g.n, g.k_rows, nullptr,
                                  k_begin, k_end, static_cast<T*>(panel));
    });
}

template <class T>
void multiply(const void* a_panel, const void* b_panel, int64_t count, void* tile) {
    constexpr int M = kPanelRows, V = kPanelVectors, W = VectorOf<T>::width;
    const T* a = static_cast<const T*>(a_panel);
    const T* b = static_cast<const T*>(b_panel);
    T* out = static_cast<T*>(tile);
    Vector<T> sums[M][V] = {};
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; ++k, a += M, b += V * W) {
        Vector<T> row[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) row[j] = load(b + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sums[i][j] += row[j] * a[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) store(out + (i * V + j) * W, sums[i][j]);
}

template <class T>
void add_to_out(const MatmulArguments& g, int64_t m, int64_t n, bool first, const void* product) {
    constexpr int N = kPanelColumns<T>;
    const int rows = static_cast<int>(g.m - m < kPanelRows ? g.m - m : kPanelRows);
    const int columns = static_cast<int>(g.n - n < N ? g.n - n : N);
    const T* tile = static_cast<const T*>(product);
    const T* bias = first && g.bias ? static_cast<const T*>(g.bias) + n : nullptr;
    const T alpha = static_cast<T>(g.alpha);
    const bool overwrite = first && !g.accumulate;
    for (int i = 0; i < rows; ++i, tile += N) {
        T* out = static_cast<T*>(g.out) + (m + i) * g.out_row_stride + n * g.out_column_stride;
        if (g.out_column_stride == 1) {
            if (overwrite && bias) for (int j = 0; j < columns; ++j) out[j] = alpha * tile[j] + bias[j];
            else if (overwrite) for (int j = 0; j < columns; ++j) out[j] = alpha * tile[j];
            else for (int j = 0; j < columns; ++j) out[j] += alpha * tile[j];
        } else {
            for (int j = 0; j < columns; ++j) {
                T& entry = out[j * g.out_column_stride];
                entry = (overwrite ? T(0) : entry) + alpha * tile[j] + (bias ? bias[j] : T(0));
            }
        }
    }
}

template <class T>
void add_to_dots(const MatmulArguments& g, int64_t m, int64_t n, const void* product, double* dots) {
    constexpr int N = kPanelColumns<T>, W = VectorOf<T>::width;
    const int rows = static_cast<int>(g.m - m < kPanelRows ? g.m - m : kPanelRows);
    const int columns = static_cast<int>(g.n - n < N ? g.n - n : N);
    const T* tile = static_cast<const T*>(product);
    with_type(g.other, [&](auto* source) {
        for (int i = 0; i < rows; ++i, tile += N) {
            const auto* other = source + (g.m_rows ? g.m_rows[m + i] : m + i) * g.other.row_stride;
            Vector<T> sums = {};
            int j = 0;
            if (g.other.column_stride == 1) {
                other += n;
                for (; j + W <= columns; j += W) {
                    T wide[W];
                    for (int l = 0; l < W; ++l) wide[l] = read<T>(other + j + l);
                    sums += load(tile + j) * load(wide);
                }
            } else {
                other += n * g.other.column_stride;
            }
            double rest = 0;
            for (; j < columns; ++j)
                rest += static_cast<double>(tile[j]) * static_cast<double>(read<T>(other + j * g.other.column_stride));
            sums = fold_all<T, 1, W / 2>(&sums);
            dots[m + i] += rest + static_cast<double>(sums[0]);
        }
    });
}

template <class T>
constexpr MatmulKernels matmul_for() {
    return {kPanelRows, kPanelColumns<T>, pack_a<T>, pack_b<T>, multiply<T>, add_to_out<T>, add_to_dots<T>};
}

constexpr MatmulKernels kMatmul[2] = {matmul_for<float>(), matmul_for<double>()};

}  // namespace
}  // namespace fillm
