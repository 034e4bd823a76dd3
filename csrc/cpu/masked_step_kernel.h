// The kernels of masked steps, compiled once per instruction set by the masked_step_<set>.cpp that includes this file.
// Plain loops over dense arrays: the compiler vectorises them.
#pragma once

#include "masked_step.h"
#include "narrow.h"

namespace fillm {
namespace {

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

template <class S>
void gather(const void* from, const uint16_t* at, int count, void* to) {
    using T = typename Computes<S>::type;
    const S* source = static_cast<const S*>(from);
    T* dense = static_cast<T*>(to);
    if (!at) {
        widen_row(source, count, dense);
        return;
    }
    for (int i = 0; i < count; ++i) dense[i] = widen(source[at[i]]);
}

template <class S>
void scatter(const void* from, const uint16_t* at, int count, void* to) {
    using T = typename Computes<S>::type;
    const T* dense = static_cast<const T*>(from);
    S* target = static_cast<S*>(to);
    if (!at) {
        for (int i = 0; i < count; ++i) narrow(dense[i], target[i]);
        return;
    }
    for (int i = 0; i < count; ++i) narrow(dense[i], target[at[i]]);
}

// Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, Algorithm 2.
template <class T>
void adamw(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, int count, const StepScalars& scalars) {
    T* __restrict p = static_cast<T*>(param);
    const T* __restrict g = static_cast<const T*>(grad);
    T* __restrict m = static_cast<T*>(exp_avg);
    T* __restrict v = static_cast<T*>(exp_avg_sq);
    const T clip = static_cast<T>(scalars.clip), decay = static_cast<T>(scalars.decay);
    const T fresh1 = static_cast<T>(1 - scalars.beta1), fresh2 = static_cast<T>(1 - scalars.beta2);
    const T beta2 = static_cast<T>(scalars.beta2), step = static_cast<T>(scalars.step_size);
    const T scale = static_cast<T>(scalars.scale), eps = static_cast<T>(scalars.eps);
    for (int i = 0; i < count; ++i) {
        const T gradient = g[i] * clip;
        m[i] += fresh1 * (gradient - m[i]);
        v[i] = beta2 * v[i] + fresh2 * gradient * gradient;
        p[i] = p[i] * decay - step * (m[i] / (square_root(v[i]) * scale + eps));
    }
}

// Liu et al., Sophia, arXiv 2305.14342, Algorithm 3. Comparisons are written so that a NaN stays one.
template <class T>
void sophia(void* param, const void* grad, void* exp_avg, void* hessian, const void* estimate, int count,
            const StepScalars& scalars) {
    T* __restrict p = static_cast<T*>(param);
    const T* __restrict g = static_cast<const T*>(grad);
    T* __restrict m = static_cast<T*>(exp_avg);
    T* __restrict h = static_cast<T*>(hessian);
    const T* __restrict fresh = static_cast<const T*>(estimate);
    const T clip = static_cast<T>(scalars.clip), decay = static_cast<T>(scalars.decay);
    const T fresh1 = static_cast<T>(1 - scalars.beta1), fresh2 = static_cast<T>(1 - scalars.beta2);
    const T step = static_cast<T>(scalars.step_size), gamma = static_cast<T>(scalars.scale);
    const T eps = static_cast<T>(scalars.eps);
    if (fresh)
        for (int i = 0; i < count; ++i) h[i] += fresh2 * (fresh[i] - h[i]);
    for (int i = 0; i < count; ++i) {
        m[i] += fresh1 * (g[i] * clip - m[i]);
        const T curvature = gamma * h[i];
        T update = m[i] / (curvature < eps ? eps : curvature);
        update = update > T(1) ? T(1) : update;
        update = update < T(-1) ? T(-1) : update;
        p[i] = p[i] * decay - step * update;
    }
}

template <class T>
double squares(const void* values, int count) {
    constexpr int lanes = 16;  // partial sums in double: a fixed order that the compiler may still vectorise
    const T* own = static_cast<const T*>(values);
    double sums[lanes] = {};
    int i = 0;
    for (; i + lanes <= count; i += lanes)
        for (int lane = 0; lane < lanes; ++lane)
            sums[lane] += static_cast<double>(own[i + lane]) * static_cast<double>(own[i + lane]);
    for (int lane = 0; i + lane < count; ++lane)
        sums[lane] += static_cast<double>(own[i + lane]) * static_cast<double>(own[i + lane]);
    double total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += sums[lane];
    return total;
}

template <class S>
constexpr MaskedStepKernels masked_step_for() {
    using T = typename Computes<S>::type;
    return {gather<S>, scatter<S>, adamw<T>, sophia<T>, squares<T>};
}

constexpr MaskedStepKernels kMaskedStep[kDtypes] = {masked_step_for<float>(), masked_step_for<double>(),
                                                    masked_step_for<BFloat16>(), masked_step_for<Float16>()};

}  // namespace
}  // namespace fillm
