// Dense kinds of sketch on the CPU: what the driver (dense_sketch.cpp) and the per-instruction-set kernels share.
//
// The entries of a map, the seed law's 7 and 8, are made a tile at a time and multiplied while they are in the
// first-level cache, for all vectors of a call.
#pragma once

#include <cstdint>

#include "types.h"

namespace fillm {

constexpr uint32_t kRademacher = 3, kGaussian = 4;  // positions in KINDS
constexpr int64_t kTileCoordinates = 64, kTileColumns = 64;

struct DenseMap {
    uint64_t seed;
    uint32_t kind;
    int64_t dim;
};

// Entries of `count` coordinates and kTileColumns columns from `column` on, unscaled; only the first `columns`, a
// multiple of two vectors, are made.
struct DenseTile {
    DenseMap map;
    const uint64_t* coordinates;
    int64_t count, column, columns;
    void* entries;  // [count, kTileColumns] of the computing type, 64-byte aligned
};

// sums[rows, kTileColumns] += values[rows, count] entries, row by row in the order of the coordinates.
struct DenseProduct {
    const void* values;
    int64_t stride, rows;  // of values
    void* widened;         // [rows, kTileCoordinates] of the computing type, for narrower values
    void* sums;
};

struct DenseKernels {
    int vector;  // lanes; tiles are made two vectors at a time
    void (*tile)(const DenseTile&);
    void (*add)(const DenseTile&, const DenseProduct&);
};

const DenseKernels* dense_generic_kernels();  // kDtypes entries
#ifdef FILLM_X86
const DenseKernels* dense_avx2_kernels();
const DenseKernels* dense_avx512_kernels();
#endif

struct DenseSketchArguments {
    DenseMap map;
    const void* values;          // [samples, count], rows `stride` entries apart
    int64_t stride, samples, count;
    int64_t offset;              // flat coordinate of values[0]
    const int64_t* row_offsets;  // [samples], of every row in the place of `offset`; null where it is one for all
    void* out;                   // [samples, dim], float32 (float64 for float64), written
    Dtype dtype;
    int threads;
};

// `instruction_set` as listed by instruction_sets(), or "" for the fastest; throws std::invalid_argument.
void sketch_dense(const DenseSketchArguments& arguments, const char* instruction_set);

// Rows of a map: out[i, 0 .. dim), rows `stride` entries apart, are the entries of coordinates[i], scaled; `dtype` is
// float32 or float64.
void dense_rows(const DenseMap& map, const int64_t* coordinates, int64_t count, void* out, int64_t stride, Dtype dtype,
                int threads, const char* instruction_set);

}  // namespace fillm
