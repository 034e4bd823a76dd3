// ghost_norm on the CPU: what the driver (ghost_norm.cpp) and the per-instruction-set kernels share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace fillm {

enum Form : int { kAuto = 0, kGram = 1, kExplicit = 2 };

// One Gram work item: rows `a` against rows `b` of the same sample (the same list if `diagonal`).
struct GramTask {
    Matrix x, dy;
    const int64_t* a;
    const int64_t* b;
    int count_a, count_b;
    bool diagonal;
};

// One explicit work item: the block [wide_begin, wide_end) x [narrow_begin, narrow_end) of dy^T x (or of its transpose).
struct ExplicitTask {
    Matrix wide, narrow;
    const int64_t* rows;
    int64_t count;
    int64_t wide_begin, wide_end, narrow_begin, narrow_end;
};

// Kernels of one instruction set for one element type. Each returns its share of |dy^T x|^2.
struct Kernels {
    double (*gram)(const GramTask&, void* scratch);
    double (*explicit_form)(const ExplicitTask&, void* scratch);
    size_t scratch_bytes;
};

// Largest blocks a task may hold; they depend on nothing but these constants, so neither do the bits of the result.
constexpr int kGramRows = 64;
constexpr int kNarrowBlock = 96;
constexpr int kWideBlock = 1024;

const Kernels* generic_kernels();  // kDtypes entries
#ifdef FILLM_X86
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
#endif

struct GhostNormArguments {
    Matrix x, dy;
    const int64_t* offsets;  // [samples + 1]
    int64_t samples;
    double* norms;           // [samples], written
    Dtype dtype;
    Form form;
    int threads;
};

// `instruction_set` as listed by instruction_sets(), or "" for the fastest; throws std::invalid_argument.
void ghost_norm(const GhostNormArguments& arguments, const char* instruction_set);

// flags[r] = whether row r holds anything but (positive or negative) zeros.
void nonzero_rows(const void* data, int64_t stride, int64_t rows, int64_t columns, int itemsize, bool* flags,
                  int threads);

}  // namespace fillm
