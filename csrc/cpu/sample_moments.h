// sample_moments on the CPU: every tile of every per-sample gradient is formed once, in registers, and all is taken
// from it.
#pragma once

#include <cstdint>

#include "matmul.h"
#include "sketch.h"

namespace fillm {

// What becomes of one tile of one sample's gradient, `rows` x `columns` of it inside the matrix.
struct MomentsTile {
    int rows, columns;
    const void* v;        // entries of `v`, `second` and `absolute` under the tile's first, or null; computing type
    void* second;
    void* absolute;
    int64_t v_stride, second_stride, absolute_stride;
    double alpha;         // factor of what is added to `second` and `absolute`
    double* norm;         // += sum of squares
    double* dot;          // += sum of products with `v`
    double* row_norms;    // [rows] += sums of squares of each row, or null
};

// One instruction set, one computing type.
struct MomentsKernels {
    MatmulKernels matmul;
    void (*take)(const MomentsTile&, const void* tile);
};

const MomentsKernels* generic_moments();  // [0] float, [1] double
#ifdef FILLM_X86
const MomentsKernels* avx2_moments();
const MomentsKernels* avx512_moments();
#endif

struct MomentsArguments {
    Operand x, dy;           // [N, I], [N, O]
    const int64_t* rows;     // rows of both that stand for 0 .. offsets[samples] - 1; null for themselves
    const int64_t* offsets;  // [samples + 1]
    int64_t samples, inputs, outputs;
    Operand v;               // [O, I], columns next to each other; null data for none
    Operand second, absolute;  // likewise, added to
    double alpha;
    double* norms;           // [samples], written
    double* dots;            // [samples], written, or null
    double* row_norms;       // [samples, O], written, or null
    SketchMap map;           // of the sketch
    double sketch_scale;
    void* sketches;          // [samples, map.dim()] of the computing type, written, or null
    Dtype computes;
    int threads;
};

// `instruction_set` as listed by instruction_sets(), or "" for the fastest; throws std::invalid_argument.
void sample_moments(const MomentsArguments& arguments, const char* instruction_set);

}  // namespace fillm
