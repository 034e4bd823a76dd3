// sketch on the CPU: what the driver (sketch.cpp) and the per-instruction-set kernels share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace fillm {

// A block-wise map, fillm_kernels/seed_law.py: BlockMap. `kind` is the position in KINDS.
struct SketchMap {
    uint64_t seed;
    uint32_t kind;
    int64_t chunks, ranges, width;

    int64_t chunk_dim() const { return ranges * width; }
    int64_t dim() const { return chunks * chunk_dim(); }
};

constexpr int kSigns = 32;  // blocks that share a word of sign bits

// Adds the sketch of values[0 .. count), flat coordinates `begin` onwards, to bins[dim].
struct SketchPiece {
    SketchMap map;
    const void* values;
    int64_t begin, count;
    void* bins;
};

// Adds the sketch of a tile of a gradient [O, I], coordinate (o, i) being o I + i: tile[r * stride + c] is entry
// (row + r, column + c). One call per sample and tile; the bins are the sample's own.
struct SketchTile {
    SketchMap map;
    const void* values;
    int64_t stride, rows, columns;
    int64_t row, column, inputs;
    void* bins;
};

struct SketchKernels {
    void (*piece)(const SketchPiece&, void* scratch);
    void (*tile)(const SketchTile&);
};

size_t sketch_scratch_bytes(const SketchMap& map);

const SketchKernels* sketch_generic_kernels();  // kDtypes entries
#ifdef FILLM_X86
const SketchKernels* sketch_avx2_kernels();
const SketchKernels* sketch_avx512_kernels();
#endif

struct SketchArguments {
    SketchMap map;
    const void* values;  // [samples, count], rows `stride` entries apart
    int64_t stride, samples, count;
    int64_t offset;      // flat coordinate of values[0]
    void* out;           // [samples, dim], float32 (float64 for float64), written
    Dtype dtype;
    double scale;
    int threads;
};

// `instruction_set` as listed by instruction_sets(), or "" for the fastest; throws std::invalid_argument.
void sketch(const SketchArguments& arguments, const char* instruction_set);
void sketch_tile(const SketchTile& tile, Dtype dtype, const char* instruction_set);

}  // namespace fillm
