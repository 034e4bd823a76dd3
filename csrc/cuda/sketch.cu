// sketch on CUDA devices: a warp owns 128 bins in registers and loads what falls on them.
//
// A block of coordinates is a rotation of a run of bins (docs/seed-law.md), so what falls on neighbouring bins lies in
// neighbouring places: lanes load consecutive entries and add in registers. There are no atomics, and no shared memory
// in the loop. A sign word of a bin serves 32 blocks; the 32 starts are hashed by the 32 lanes and passed on by shuffles;
// blocks of a countsketch that fall on another run are struck off the warp's list before anything is loaded.
//
// Why it should reach the memory's rate (untimed; an H200 has 132 multiprocessors, 4.8 TB/s, some 1.75 GHz):
//  - In flight: 16 loads a lane (8 of float64), 32 warps a multiprocessor: 64 KiB, 32 KiB of 16-bit entries; the rate
//    times a latency of 0.7 us is 25 KiB. With 64 registers a thread, all of them used, more loads would spill.
//  - Instructions, counted in the code for sm_90a: 162 for 16 entries of float32, 10 an entry, and 2 an entry for the
//    hashes of a group. Four a clock make 10.6 entries a clock and multiprocessor. 85 % of the rate are 4.4 of float32,
//    8.8 of 16 bits: the narrow types have little to spare.
//  - A rotated run starts anywhere, so a warp touches 17 sectors for 16 (9 for 8 of 16 bits); the one too many is its
//    neighbour's, in the same thread block, and found in the cache.
//  - Wide loads would need a lane's bins to be aligned in every rotation, which no layout is.
// An sjlt loads and adds each entry once for each of its maps; up to 16 warps of a thread block own all of up to 2048
// bins, so that most of these loads are found in the first-level cache. Instructions are its limit: a quarter of the
// rate above for 4 maps.
#include "sketch.h"

#include <algorithm>

#include "../cpu/seed_law.h"
#include "element.h"
#include "launch.h"

namespace fillm {
namespace {

constexpr int kSignBlocks = 32;        // blocks that share a word of sign bits: a group
constexpr int kLaneBins = 4;           // bins of a lane
constexpr int kTile = kWarp * kLaneBins;
constexpr int kWarps = 16;             // of a thread block
constexpr int64_t kThreadBlocks = 1024;  // of one vector at most; a constant, so that bits do not depend on the device
constexpr int64_t kGroups = 2;         // groups a warp adds up at least, where there are as many
constexpr int kSumBins = 32;           // bins of a thread block of the sum

// Shares of one launch: tiles and parts of a thread block's warps. 32 bits where sizes allow: a division is short then.
struct Shares {
    int64_t first_group, groups;  // that the vector touches
    uint32_t runs, tiles;         // tiles of a run of bins, and of all bins
    uint32_t tiles_together;      // tiles of a thread block; its other warps take other groups of the same tiles
    uint32_t tile_sets, parts;
    int64_t share;                // groups of a warp
    Key seed;                     // what keys are made of

    __host__ __device__ uint32_t local_parts() const { return kWarps / tiles_together; }
};

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

Shares shares_of(const CudaSketch& job) {
    Shares s{};
    const int64_t group = kSignBlocks * job.width;
    s.first_group = job.offset / group;
    s.groups = job.count ? divided(job.offset + job.count, group) - s.first_group : 0;
    s.runs = static_cast<uint32_t>(divided(job.width, kTile));
    s.tiles = static_cast<uint32_t>(job.chunks * job.ranges) * s.runs;
    const uint32_t most = job.chunks > 1 ? kWarps : kWarps / 2;
    for (s.tiles_together = 1; s.tiles_together < most && s.tiles_together < s.tiles;) s.tiles_together *= 2;
    s.tile_sets = static_cast<uint32_t>(divided(s.tiles, s.tiles_together));
    const int64_t by_length = divided(s.groups, kGroups * s.local_parts());
    s.parts = static_cast<uint32_t>(std::max<int64_t>(1, std::min(by_length, kThreadBlocks / s.tile_sets)));
    s.share = divided(s.groups, s.parts * s.local_parts());
    s.seed = seeded(job.seed);
    return s;
}

// The bins of one lane: columns of run `home` of a chunk. A column past the run is put on its last one, so that loads
// need no guard; nothing takes its sum.
template <class S>
struct Owned {
    uint32_t chunk, home, column[kLaneBins];
    typename S::Wide sums[kLaneBins];
};

// Adds the lowest kBlocks blocks of `todo`, in order, and strikes them off. `rotation` is that of the lane's block;
// `row` is where the group's first coordinate lies, or would lie. Loads come first: all of them are in flight together.
template <int kBlocks, bool kUnit, class S, class Inside>
__device__ __forceinline__ void add_blocks(const CudaSketch& job, const S* row, unsigned& todo, uint32_t rotation,
                                           const uint32_t* words, Owned<S>& own, Inside inside) {
    const uint32_t width = static_cast<uint32_t>(job.width);
    S loaded[kBlocks][kLaneBins];
    int bits[kBlocks];
#pragma unroll
    for (int u = 0; u < kBlocks; ++u) {
        bits[u] = __ffs(todo) - 1;
        todo &= todo - 1;
        const uint32_t turned = __shfl_sync(kAllLanes, rotation, bits[u]);
        const uint64_t before = static_cast<uint64_t>(static_cast<uint32_t>(bits[u])) * width;
        const S* block = settled(row + (kUnit ? before : before * static_cast<uint64_t>(job.step)));
#pragma unroll
        for (int k = 0; k < kLaneBins; ++k) {
            // The smaller of the two as unsigned numbers: what is negative has wrapped around.
            const uint32_t back = own.column[k] - turned, position = back < back + width ? back : back + width;
            loaded[u][k] = S{};
            if (inside(before + position)) loaded[u][k] = read(block + (kUnit ? position : position * job.step));
        }
    }
#pragma unroll
    for (int u = 0; u < kBlocks; ++u)
#pragma unroll
        for (int k = 0; k < kLaneBins; ++k) own.sums[k] += flipped(widen(loaded[u][k]), words[k] << (31 - bits[u]));
}

template <class S, bool kUnit>
__device__ __forceinline__ void add_group(const CudaSketch& job, Key seed, const S* row, int64_t group, Owned<S>& own) {
    constexpr int kAtOnce = !kUnit ? 1 : sizeof(S) == 8 ? 2 : 4;  // more would spill
    const uint32_t chunk_dim = static_cast<uint32_t>(job.ranges * job.width), width = static_cast<uint32_t>(job.width);
    const int64_t group_begin = group * kSignBlocks * job.width - job.offset;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint64_t block = static_cast<uint64_t>(group * kSignBlocks + lane);
    const Key start_state = state_of(key_of(seed, job.kind, kStart, own.chunk), block);
    const uint32_t start = below(cell(start_state, 0), chunk_dim);
    const uint32_t home = job.ranges == 1 ? 0 : start / width, rotation = start - home * width;
    const int64_t begin = group_begin + lane * job.width;
    const bool touched = begin < job.count && begin + job.width > 0;
    const bool cut = begin < 0 || begin + job.width > job.count;
    unsigned todo = __ballot_sync(kAllLanes, touched && home == own.home);
    const bool any_cut = (__ballot_sync(kAllLanes, cut) & todo) != 0;

    const Key state = state_of(key_of(seed, job.kind, kSign, own.chunk), static_cast<uint64_t>(group));
    uint32_t words[kLaneBins];
#pragma unroll
    for (int k = 0; k < kLaneBins; ++k) words[k] = cell(state, own.home * width + own.column[k]);
    row += kUnit ? group_begin : group_begin * job.step;
    if (!any_cut) {
        const auto always = [](uint64_t) { return true; };
        while (__popc(todo) >= kAtOnce) add_blocks<kAtOnce, kUnit>(job, row, todo, rotation, words, own, always);
        while (todo) add_blocks<1, kUnit>(job, row, todo, rotation, words, own, always);
    } else {  // the vector begins or ends inside a block
        const auto inside = [&](uint64_t at) {
            const int64_t entry = group_begin + static_cast<int64_t>(at);
            return entry >= 0 && entry < job.count;
        };
        while (todo) add_blocks<1, kUnit>(job, row, todo, rotation, words, own, inside);
    }
}

// parts[sample, part]: the bins of a part of the groups. Thread blocks: [sample, part, set of tiles].
template <class S, bool kUnit, int kShared>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    sketch_parts(CudaSketch job, Shares shares, const S* __restrict__ values, typename S::Wide* __restrict__ parts) {
    using Wide = typename S::Wide;
    static_assert(kShared == sizeof(Wide) * kWarps * kTile, "a slot for every warp's bins");
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const uint32_t row = blockIdx.x / shares.tile_sets;
    const uint32_t first_tile = blockIdx.x % shares.tile_sets * shares.tiles_together;
    const uint32_t tile = first_tile + warp % shares.tiles_together, run = tile / shares.runs;

    Owned<S> own;
    own.chunk = run / static_cast<uint32_t>(job.ranges);
    own.home = run % static_cast<uint32_t>(job.ranges);
    for (int k = 0; k < kLaneBins; ++k) {
        const uint32_t column = tile % shares.runs * kTile + k * kWarp + lane;
        const uint32_t last = static_cast<uint32_t>(job.width) - 1;
        own.column[k] = column < last ? column : last;
        own.sums[k] = 0;
    }
    if (tile < shares.tiles) {
        const int64_t sample = row / shares.parts, part = row % shares.parts;
        const int64_t begin = (part * shares.local_parts() + warp / shares.tiles_together) * shares.share;
        const int64_t end = begin + shares.share < shares.groups ? begin + shares.share : shares.groups;
        for (int64_t group = begin; group < end; ++group)
            add_group<S, kUnit>(job, shares.seed, values + sample * job.stride, shares.first_group + group, own);
    }
    Wide* slots = block_memory<Wide[kWarps * kTile]>();
    for (int k = 0; k < kLaneBins; ++k) slots[warp * kTile + k * kWarp + lane] = own.sums[k];
    __syncthreads();
    // The warps of one tile, in the order of their groups.
    const uint32_t entries = shares.tiles_together * kTile;
    for (uint32_t entry = threadIdx.x; entry < entries; entry += kWarps * kWarp) {
        const uint32_t owner = first_tile + entry / kTile, column = owner % shares.runs * kTile + entry % kTile;
        if (owner >= shares.tiles || column >= job.width) continue;
        Wide total = 0;
        for (uint32_t slot = entry; slot < kWarps * kTile; slot += entries) total += slots[slot];
        const int64_t bin = owner / shares.runs * job.width + column, dim = job.chunks * job.ranges * job.width;
        parts[row * dim + bin] = total;
    }
}

// out[sample, bin] = scale * sum of parts[sample, :, bin]: 16 warps add consecutive parts, then their sums in order.
template <class Wide, int kShared>
__global__ void __launch_bounds__(kWarps* kSumBins)
    sketch_sum(const Wide* __restrict__ parts, Wide* __restrict__ out, int64_t count, int64_t dim, Wide scale) {
    static_assert(kShared == sizeof(Wide) * kWarps * kSumBins, "a slot for every thread");
    const int64_t tiles = (dim + kSumBins - 1) / kSumBins;
    const int warp = static_cast<int>(threadIdx.x) / kSumBins, lane = static_cast<int>(threadIdx.x) % kSumBins;
    const int64_t sample = blockIdx.x / tiles, bin = blockIdx.x % tiles * kSumBins + lane;
    const int64_t share = (count + kWarps - 1) / kWarps, begin = warp * share;
    const int64_t end = begin + share < count ? begin + share : count;
    Wide total = 0;
    if (bin < dim) {
        const Wide* column = parts + sample * count * dim + bin;
#pragma unroll 8
        for (int64_t part = begin; part < end; ++part) total += column[part * dim];
    }
    Wide* slots = block_memory<Wide[kWarps * kSumBins]>();
    slots[warp * kSumBins + lane] = total;
    __syncthreads();
    if (warp == 0 && bin < dim) {
        for (int other = 1; other < kWarps; ++other) total += slots[other * kSumBins + lane];
        out[sample * dim + bin] = total * scale;
    }
}

template <class S>
void run(const CudaSketch& job, const void* values, void* parts, void* out, double scale, uintptr_t stream) {
    using Wide = typename S::Wide;
    constexpr int kShared = sizeof(Wide) * kWarps * kTile, kSumShared = sizeof(Wide) * kWarps * kSumBins;
    const Shares shares = shares_of(job);
    const auto kernel = job.step == 1 ? sketch_parts<S, true, kShared> : sketch_parts<S, false, kShared>;
    launch<kShared>(kernel, job.samples * shares.parts * shares.tile_sets, kWarps * kWarp, stream, job, shares,
                    static_cast<const S*>(values), static_cast<Wide*>(parts));
    launch<kSumShared>(sketch_sum<Wide, kSumShared>, job.samples * divided(job.dim(), kSumBins), kWarps * kSumBins,
                       stream, static_cast<const Wide*>(parts), static_cast<Wide*>(out), shares.parts, job.dim(),
                       static_cast<Wide>(scale));
}

}  // namespace

int64_t cuda_sketch_parts(const CudaSketch& job) { return shares_of(job).parts; }

void cuda_sketch(const CudaSketch& job, Dtype dtype, const void* values, void* parts, void* out, double scale,
                 uintptr_t stream) {
    if (dtype == kFloat64) run<Float64Bits>(job, values, parts, out, scale, stream);
    else if (dtype == kBFloat16) run<BFloat16Bits>(job, values, parts, out, scale, stream);
    else if (dtype == kFloat16) run<Float16Bits>(job, values, parts, out, scale, stream);
    else run<Float32Bits>(job, values, parts, out, scale, stream);
}

}  // namespace fillm
