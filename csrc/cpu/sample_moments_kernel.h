// What is taken from a tile while it is in the L1 cache, compiled once per instruction set by sample_moments_<set>.cpp.
#pragma once

#include "matmul_kernel.h"
#include "sample_moments.h"

namespace fillm {
namespace {

template <class T>
inline double sum_of(Vector<T> lanes) {
    return static_cast<double>(fold_all<T, 1, VectorOf<T>::width / 2>(&lanes)[0]);
}

// body(j) for whole vectors of a row, rest(j) for the entries after them.
template <class T, class Body, class Rest>
inline void along(int columns, const Body& body, const Rest& rest) {
    constexpr int W = VectorOf<T>::width;
    int j = 0;
    for (; j + W <= columns; j += W) body(j);
    for (; j < columns; ++j) rest(j);
}

template <class T>
void take(const MomentsTile& task, const void* entries) {
    constexpr int N = kPanelColumns<T>, W = VectorOf<T>::width;
    const T* tile = static_cast<const T*>(entries);
    const T alpha = static_cast<T>(task.alpha);
    Vector<T> all_squares = {}, all_products = {};
    double rest_of_products = 0;
    for (int i = 0; i < task.rows; ++i, tile += N) {
        Vector<T> squares = {};
        for (int j = 0; j < N; j += W) squares += load(tile + j) * load(tile + j);  // zeros beyond the edge
        if (task.row_norms) task.row_norms[i] += sum_of<T>(squares);
        all_squares += squares;
        if (task.v) {
            const T* v = static_cast<const T*>(task.v) + i * task.v_stride;
            along<T>(task.columns, [&](int j) { all_products += load(tile + j) * load(v + j); },
                     [&](int j) { rest_of_products += static_cast<double>(tile[j]) * static_cast<double>(v[j]); });
        }
        if (task.second) {
            T* second = static_cast<T*>(task.second) + i * task.second_stride;
            along<T>(task.columns, [&](int j) { store(second + j, load(second + j) + load(tile + j) * load(tile + j) * alpha); },
                     [&](int j) { second[j] += tile[j] * tile[j] * alpha; });
        }
        if (task.absolute) {
            T* absolute = static_cast<T*>(task.absolute) + i * task.absolute_stride;
            auto magnitude = [&](T value) { return (value < T(0) ? -value : value) * alpha; };
            along<T>(task.columns,
                     [&](int j) {
                         const Vector<T> value = load(tile + j);
                         store(absolute + j, load(absolute + j) + (value < T(0) ? -value : value) * alpha);
                     },
                     [&](int j) { absolute[j] += magnitude(tile[j]); });
        }
    }
    *task.norm += sum_of<T>(all_squares);
    if (task.v) *task.dot += sum_of<T>(all_products) + rest_of_products;
}

constexpr MomentsKernels kMoments[2] = {{matmul_for<float>(), take<float>}, {matmul_for<double>(), take<double>}};

}  // namespace
}  // namespace fillm
