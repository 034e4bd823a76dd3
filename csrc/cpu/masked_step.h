// Optimiser steps and norms over masked weights on the CPU: masked_adamw_, masked_sophia_ and masked_norm. What the driver
// (masked_step.cpp) and the per-instruction-set kernels share.
#pragma once

#include <cstdint>

#include "types.h"

namespace fillm {

constexpr int kMaskBlock = 2048;  // weights a prefix count stands for; as fillm_kernels/selection.py

// Numbers of one step, as each rule reads them.
struct StepScalars {
    double decay;        // 1 - lr * weight_decay
    double clip;         // factor of the gradient
    double beta1, beta2;
    double step_size;    // lr (over the first bias correction for AdamW)
    double scale;        // AdamW: 1 / sqrt(second bias correction); Sophia: gamma
    double eps;
};

// Kernels of one instruction set for one element type. Between `gather` and `scatter` weights are float (double for
// float64) and lie one after another.
struct MaskedStepKernels {
    // to[i] = from[at[i]] widened, or from[i] where `at` is null.
    void (*gather)(const void* from, const uint16_t* at, int count, void* to);
    // The way back, rounded to the nearest, ties to even.
    void (*scatter)(const void* from, const uint16_t* at, int count, void* to);
    void (*adamw)(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, int count, const StepScalars&);
    // `estimate` is null on steps that keep the Hessian.
    void (*sophia)(void* param, const void* grad, void* exp_avg, void* hessian, const void* estimate, int count,
                   const StepScalars&);
    double (*squares)(const void* values, int count);
};

const MaskedStepKernels* generic_masked_step();  // kDtypes entries
#ifdef FILLM_X86
const MaskedStepKernels* avx2_masked_step();
const MaskedStepKernels* avx512_masked_step();
#endif

// Which weights of a tensor are meant: those whose bit is set, or whole rows. State lies in their order, without gaps.
struct Selected {
    const uint8_t* bits;      // [ceil(entries / 8)], or null
    const int64_t* starts;    // [ceil(entries / kMaskBlock) + 1]: selected weights before each block
    int64_t entries;
    const int64_t* rows;      // [row_count], where bits is null
    int64_t row_count, columns;
};

struct Values {
    const void* data;
    Dtype dtype;
};

enum Rule : int { kAdamw = 0, kSophia = 1 };

struct MaskedStepArguments {
    void* param;
    Dtype dtype;
    Values grad, estimate;    // estimate.data may be null
    void* first;              // float, or double for float64 parameters
    void* second;
    Selected selected;
    Rule rule;
    StepScalars scalars;
    int threads;
};

void masked_step(const MaskedStepArguments& arguments, const char* instruction_set);

// Sum of the squares of the selected values, added up in an order that depends on sizes alone.
double masked_squares(const Values& grad, const Selected& selected, int threads, const char* instruction_set);

}  // namespace fillm
