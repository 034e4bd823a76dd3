// factored_sketch with sparse sides on the CPU: what the driver (factored_sketch.cpp) and the kernels share.
//
//     S_out G_b S_in^T = sum_t (S_out dy_t)(S_in x_t)^T      docs/kernels/factored_sketch.md; GraSS, arXiv 2505.18976
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

struct FactoredKernels {
    int lanes;
    void (*project)(const ProjectTask&);
    void (*multiply)(const ProductTask&);
};

const FactoredKernels* factored_generic_kernels();  // kDtypes entries
#ifdef FILLM_X86
const FactoredKernels* factored_avx2_kernels();
const FactoredKernels* factored_avx512_kernels();
#endif

// A side: sjlt maps of `dim` bins in `chunks` equal parts, one map a seed.
struct FactoredSide {
    Matrix rows;
    int64_t dim, chunks;
    const uint64_t* seeds;  // [maps]
};

struct FactoredSketchArguments {
    FactoredSide sides[2];   // of dy, of x
    const int64_t* offsets;  // [samples + 1]
    int64_t samples, maps;
    uint32_t kind;           // of sjlt, a position in KINDS
    void* out;               // [samples, maps, k_out, k_in], float32 (float64 for float64), written
    Dtype dtype;
    int threads;
};

// `instruction_set` as listed by instruction_sets(), or "" for the fastest; throws std::invalid_argument.
void factored_sketch(const FactoredSketchArguments& arguments, const char* instruction_set);

// `sketch` of many rows by a map of one range and few bins a chunk, by the same kernels; pieces of coordinates, and so
// all bits, are those of `sketch`.
void sketch_narrow(const SketchArguments& arguments, int64_t piece, const char* instruction_set);

}  // namespace fillm
