// The kernels of soir_sweep, compiled once per instruction set by the soir_sweep_<set>.cpp that includes this file.
//
// A few rows at a time come from memory for their dot products and are read again from the cache for the weighted sum.
#pragma once

#include "soir_sweep.h"
#include "wide_loads.h"

namespace fillm {
namespace {

constexpr int kRows = 4;           // rows that stay in the cache between their two uses
constexpr int64_t kChunk = 4096;   // terms summed in the narrow type before they are added in double

// dots[r] = <s_r, v>, the R rows side by side.
template <class S, int R>
void dot_rows(const S* s, const typename Computes<S>::type* v, int64_t k, double* dots) {
    using T = typename Computes<S>::type;
    constexpr int W = VectorOf<T>::width;
    for (int r = 0; r < R; ++r) dots[r] = 0;
    for (int64_t begin = 0; begin < k; begin += kChunk) {
        const int64_t end = k - begin < kChunk ? k : begin + kChunk;
        Vector<T> even[R] = {}, odd[R] = {};
        int64_t j = begin;
        for (; j + 2 * W <= end; j += 2 * W) {
            const Vector<T> one = load(v + j), other = load(v + j + W);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                even[r] += load_wide(s + r * k + j) * one;
                odd[r] += load_wide(s + r * k + j + W) * other;
            }
        }
        for (int r = 0; r < R; ++r) {
            const Vector<T> lanes = even[r] + odd[r];
            double sum = 0;
            for (int l = 0; l < W; ++l) sum += static_cast<double>(lanes[l]);
            for (int64_t rest = j; rest < end; ++rest)
                sum += static_cast<double>(widen(s[r * k + rest])) * static_cast<double>(v[rest]);
            dots[r] += sum;
        }
    }
}

template <class S, int R>
void add_rows(const S* s, const typename Computes<S>::type* c, int64_t k, typename Computes<S>::type* sum) {
    using T = typename Computes<S>::type;
    constexpr int W = VectorOf<T>::width;
    int64_t j = 0;
    for (; j + W <= k; j += W) {
        Vector<T> total = load(sum + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total += load_wide(s + r * k + j) * c[r];
        store(sum + j, total);
    }
    for (; j < k; ++j)
        for (int r = 0; r < R; ++r) sum[j] += widen(s[r * k + j]) * c[r];
}

template <class S, int R>
void rows_of(SweepTask& task, int64_t first) {
    using T = typename Computes<S>::type;
    const S* s = static_cast<const S*>(task.s) + first * task.k;
    double dots[R];
    T c[R];
    dot_rows<S, R>(s, static_cast<const T*>(task.v), task.k, dots);
    for (int r = 0; r < R; ++r) {
        const double curvature = task.lambda + task.norms[first + r];
        const double weight = curvature == 0 && dots[r] == 0 ? 0 : dots[r] / curvature;
        static_cast<T*>(task.dots)[first + r] = static_cast<T>(dots[r]);
        c[r] = static_cast<T>(weight);
        task.cross += weight * dots[r];
    }
    add_rows<S, R>(s, c, task.k, static_cast<T*>(task.sum));
}

template <class S>
void sweep(SweepTask& task) {
    using T = typename Computes<S>::type;
    std::memset(task.sum, 0, sizeof(T) * static_cast<size_t>(task.k));
    task.cross = 0;
    int64_t row = 0;
    for (; row + kRows <= task.rows; row += kRows) rows_of<S, kRows>(task, row);
    for (; row < task.rows; ++row) rows_of<S, 1>(task, row);
}

template <class T>
void join(const void* from, int64_t parts, int64_t k, const void* v, double rows, void* to, double squares[2]) {
    constexpr int lanes = 8;  // partial sums in a fixed order
    double apart[lanes] = {}, own[lanes] = {};
    for (int64_t j = 0; j < k; ++j) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += static_cast<double>(static_cast<const T*>(from)[part * k + j]);
        static_cast<T*>(to)[j] = static_cast<T>(sum);
        const double value = static_cast<double>(static_cast<const T*>(v)[j]);
        const double difference = rows > 0 ? value - sum / rows : value;
        apart[j % lanes] += difference * difference;
        own[j % lanes] += value * value;
    }
    squares[0] = squares[1] = 0;
    for (int lane = 0; lane < lanes; ++lane) {
        squares[0] += apart[lane];
        squares[1] += own[lane];
    }
}

template <class S>
constexpr SoirSweepKernels soir_sweep_for() {
    return {sweep<S>, join<typename Computes<S>::type>};
}

constexpr SoirSweepKernels kSoirSweep[kDtypes] = {soir_sweep_for<float>(), soir_sweep_for<double>(),
                                                  soir_sweep_for<BFloat16>(), soir_sweep_for<Float16>()};

}  // namespace
}  // namespace fillm
