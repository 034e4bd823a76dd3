// Matrix product on the CPU, with what per-sample gradients need fused in: gathered and weighted rows, row dots.
//
// Operands of any strides and element types are packed into panels, widened on the way; register tiles multiply panels.
#pragma once

#include <cstdint>

#include "types.h"

namespace fillm {

struct Operand {
    const void* data;
    int64_t row_stride, column_stride;  // in entries
    Dtype dtype;
};

// out (+)= alpha a b + bias, or dots[i] = sum_j (a b)[i, j] other[i, j]; a [m, k], b [k, n].
struct MatmulArguments {
    int64_t m, n, k;
    Operand a, b;
    const int64_t* m_rows;   // rows of `a` and `other` that stand for 0 .. m - 1; null for themselves
    const int64_t* k_rows;   // columns of `a` and rows of `b` that stand for 0 .. k - 1; null for themselves
    const double* k_scale;   // factors of those rows, by their own numbers; null for ones
    double alpha;
    void* out;               // of the computing type; null for dots
    int64_t out_row_stride, out_column_stride;
    bool accumulate;
    const void* bias;        // [n] of the computing type, or null
    Operand other;           // [m, n], for dots
    double* dots;            // [m], written
    Dtype computes;          // kFloat32 or kFloat64
    int threads;
};

// One instruction set, one computing type. A panel holds `rows` rows of `a` or `columns` columns of `b`, k by k, zeros
// beyond the edge; a tile is their product, [rows, columns].
struct MatmulKernels {
    int rows, columns;
    void (*pack_a)(const MatmulArguments&, int64_t m, int64_t k_begin, int64_t k_end, void* panel);
    void (*pack_b)(const MatmulArguments&, int64_t n, int64_t k_begin, int64_t k_end, void* panel);
    void (*multiply)(const void* a, const void* b, int64_t k, void* tile);
    void (*add_to_out)(const MatmulArguments&, int64_t m, int64_t n, bool first, const void* tile);
    void (*add_to_dots)(const MatmulArguments&, int64_t m, int64_t n, const void* tile, double* dots);
};

const MatmulKernels* generic_matmul();  // [0] float, [1] double
#ifdef FILLM_X86
const MatmulKernels* avx2_matmul();
const MatmulKernels* avx512_matmul();
#endif

// `instruction_set` as listed by instruction_sets(), or "" for the fastest; throws std::invalid_argument.
void matmul(const MatmulArguments& arguments, const char* instruction_set);

}  // namespace fillm
