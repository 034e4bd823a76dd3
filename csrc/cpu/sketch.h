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

// A tile of a gradient [O, I], coordinate (o, i) being o I + i: values[r * stride + c] is entry (row + r, column + c).
struct SketchTile {
    int64_t stride, rows, columns;
    int64_t row, column, inputs;
};

// Consecutive entries of a tile that fall on consecutive bins.
struct SketchRun {
    int32_t entry, bin, count;
};

// Where a tile's entries fall: the same for every sample, so hashed once and then only added.
struct SketchPlan {
    SketchRun* runs;
    uint32_t* flips;  // the bits to flip in every entry's (upper) word, run after run: the sign or nothing
    int64_t count;    // of runs
};

struct SketchKernels {
    void (*piece)(const SketchPiece&, void* scratch);
    // Fills a plan, whose memory the caller gives.
    void (*plan)(const SketchMap&, const SketchTile&, SketchPlan&);
    // Adds a tile, float (double for float64), to bins[dim] of the same type; unscaled.
    void (*add)(const SketchPlan&, const void* values, void* bins);
};

size_t sketch_scratch_bytes(const SketchMap& map);
// Entries that runs and flips of a plan must have room for, for tiles of at most `entries`.
inline int64_t plan_room(const SketchMap& map, int64_t entries) { return map.chunks * entries; }

// Kernels for an instruction set as listed by instruction_sets(), or "" for the fastest; throws std::invalid_argument.
const SketchKernels& sketch_kernels(Dtype dtype, const char* instruction_set);

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
// Adds one tile of one gradient to bins[dim], as fused kernels do; `dtype` is that of both, float32 or float64.
void sketch_tile(const SketchMap& map, const SketchTile& tile, const void* values, void* bins, Dtype dtype,
                 const char* instruction_set);

}  // namespace fillm
