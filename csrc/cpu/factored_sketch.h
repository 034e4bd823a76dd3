// factored_sketch on the CPU: what the drivers (factored_sketch.cpp, tensorsketch.cpp) and the kernels share.
//
//     S_out G_b S_in^T = sum_t (S_out dy_t)(S_in x_t)^T      docs/kernels/factored_sketch.md; LoGra, arXiv 2405.13954;
//                                                            GraSS, arXiv 2505.18976
//     bin (h_o + h'_i) mod k takes s_o s'_i G_b[o, i]        TensorSketch, Pham and Pagh, KDD 2013
#pragma once

#include <cstddef>
#include <cstdint>

#include "sketch.h"
#include "types.h"

namespace fillm {

// Projected rows of every map are padded to a multiple of this many numbers, which all vector widths divide.
constexpr int64_t kSidePad = 16;
inline int64_t padded_side(int64_t dim) { return (dim + kSidePad - 1) / kSidePad * kSidePad; }

// Where a coordinate goes: a row of the bins, and the sign bit of a word.
struct Placement {
    uint32_t bin, sign;
};

// Up to `lanes` rows, projected to bins[padded][lanes] and then written row by row.
struct ProjectTask {
    const void* rows;  // [count, width], `stride` entries apart
    int64_t stride, width, count;
    const Placement* placements;  // [width, nonzeros]
    int64_t nonzeros, padded;
    double scale;
    void* bins;  // [padded * lanes] of the computing type, 64-byte aligned
    void* out;   // [count, padded]
};

// out[rows, columns] += left^T right over some tokens: left [tokens, >= rows] and right [tokens, >= columns], which may
// be read up to multiples of kSidePad beyond.
struct ProductTask {
    const void *left, *right;
    int64_t left_stride, right_stride, tokens, rows, columns;
    void* out;  // rows `columns` entries apart
};

// Adds some rows of the gradients of up to `lanes` samples to bins[maps][2 dim][lanes], at h_o + h'_i.
struct FoldTask {
    const void* values;  // [samples][rows, columns], samples `stride` entries apart
    int64_t stride, samples, rows, columns;
    const Placement* outputs;  // of the first row, maps `outputs_stride` apart
    int64_t outputs_stride;
    const Placement* inputs;   // of the first column, likewise
    int64_t inputs_stride, maps, dim;
    void* bins;
};

// out[s, k] = the sum over parts of bins[part][k][s] + bins[part][dim + k][s], in order.
struct UnfoldTask {
    const void* bins;  // [parts][2 dim][lanes], parts `part_stride` entries apart
    int64_t parts, part_stride, dim, samples;
    void* out;  // rows `out_stride` entries apart
    int64_t out_stride;
};

struct FactoredKernels {
    int lanes;
    void (*project)(const ProjectTask&);
    void (*multiply)(const ProductTask&);
    void (*fold)(const FoldTask&);
    void (*unfold)(const UnfoldTask&);
};

const FactoredKernels* factored_generic_kernels();  // kDtypes entries
#ifdef FILLM_X86
const FactoredKernels* factored_avx2_kernels();
const FactoredKernels* factored_avx512_kernels();
#endif

// `instruction_set` as listed by instruction_sets(), or "" for the fastest; throws std::invalid_argument.
const FactoredKernels& factored_kernels(Dtype dtype, const char* instruction_set);

// A side, one map a seed: of `dim` numbers, sparse ones of as many bins in `chunks` equal parts.
struct FactoredSide {
    Matrix rows;
    int64_t dim, chunks;
    const uint64_t* seeds;  // [maps]
};

struct FactoredSketchArguments {
    FactoredSide sides[2];   // of dy, of x
    const int64_t* offsets;  // [samples + 1]
    int64_t samples, maps;
    uint32_t kind;           // of the sides, a position in KINDS: sjlt or gaussian
    void* out;               // [samples, maps, k_out, k_in], float32 (float64 for float64), written
    Dtype dtype;
    int threads;
};

void factored_sketch(const FactoredSketchArguments& arguments, const char* instruction_set);

// `sketch` of many rows by a map of one range and few bins a chunk, by the same kernels; pieces of coordinates, and so
// all bits, are those of `sketch`.
void sketch_narrow(const SketchArguments& arguments, int64_t piece, const char* instruction_set);

// ---- TensorSketch ----------------------------------------------------------------------------------------------------

struct TensorSketchArguments {
    Matrix sides[2];         // dy, x
    const int64_t* offsets;  // [samples + 1]
    int64_t samples, dim;
    const uint64_t* seeds;   // [maps]
    int64_t maps;
    void* out;               // [samples, maps, dim], float32 (float64 for float64), written
    Dtype dtype;
    int threads;
};

// Gradients are formed, some rows of one sample at a time, and folded into its bins.
void tensorsketch(const TensorSketchArguments& arguments, const char* instruction_set);

// Count sketches of rows by one side of a TensorSketch, 0 (of dy) or 1 (of x).
struct CountSketchArguments {
    Matrix rows;
    int64_t count, dim;
    uint64_t seed;
    int side;
    void* out;  // [count, padded_side(dim)], float32 (float64 for float64), written
    Dtype dtype;
    int threads;
};

void count_sketch(const CountSketchArguments& arguments, const char* instruction_set);

}  // namespace fillm
