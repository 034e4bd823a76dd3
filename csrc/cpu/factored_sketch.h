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

// Adds rows of gradients to bins[h_o + h'_i], not yet modulo k.
struct FoldTask {
    const void* values;  // [rows, columns], `stride` entries apart
    int64_t stride, rows, columns;
    const Placement* outputs;    // [rows]
    const uint32_t* input_bins;  // [columns]
    const void* input_signs;     // [2, columns] of the computing type: the signs, and their opposites
    void* bins;                  // [2 k]
};

struct FactoredKernels {
    int lanes;
    void (*project)(const ProjectTask&);
    void (*multiply)(const ProductTask&);
    void (*fold)(const FoldTask&);
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
    Matrix sides[2];         // dy, x, of the computing type; read up to multiples of kSidePad columns
    const int64_t* offsets;  // [samples + 1]
    int64_t samples, dim;
    const uint64_t* seeds;   // [maps]
    int64_t maps;
    void* out;               // [samples, maps, dim], written
    Dtype computes;          // float32 or float64, of all
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
