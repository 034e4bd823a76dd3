// The kernels of sketch, compiled once per instruction set by the sketch_<set>.cpp that includes this file.
//
// A block of `width` coordinates falls on `width` bins next to each other, rotated: at most two runs of consecutive
// coordinates onto consecutive bins. Bit (block mod 32) of the word of (block div 32, bin) is the sign, so the words are
// hashed once for 32 blocks, and an element costs a load, a shift, a sign flip and an addition, without a conflict.
#pragma once

#include <cstring>

#include "seed_law.h"
#include "sketch.h"
#include "vectors.h"

namespace fillm {
namespace {

// bins[k] +- values[k]; the sign bit is bit 31 - shift of words[k].
template <class T>
inline void add_run(const T* __restrict values, const uint32_t* __restrict words, int shift, int64_t count,
                    T* __restrict bins) {
    for (int64_t k = 0; k < count; ++k) {
        const uint32_t sign = words[k] << shift & 0x80000000u;
        T value;
        if constexpr (sizeof(T) == 4) {
            uint32_t bits;
            std::memcpy(&bits, values + k, sizeof bits);
            bits ^= sign;
            std::memcpy(&value, &bits, sizeof value);
        } else {
            uint64_t bits;
            std::memcpy(&bits, values + k, sizeof bits);
            bits ^= static_cast<uint64_t>(sign) << 32;
            std::memcpy(&value, &bits, sizeof value);
        }
        bins[k] += value;
    }
}

// The same for values that come from memory: the additions take a quarter of the time that one core waits for them, and
// a core has more loads under way when it is told of them than when it has to guess.
template <class T>
inline void add_streamed(const T* values, const uint32_t* words, int shift, int64_t count, T* bins) {
    constexpr int64_t kLine = 64 / sizeof(T), kStep = 4 * kLine, kAhead = 64 * kLine;  // 4 KiB ahead
    int64_t k = 0;
    for (; k + kStep <= count; k += kStep) {
        for (int64_t line = 0; line < kStep; line += kLine) __builtin_prefetch(values + k + kAhead + line);
        add_run(values + k, words + k, shift, kStep, bins + k);
    }
    add_run(values + k, words + k, shift, count - k, bins + k);
}

inline void sign_words(Key state, int64_t first_bin, int64_t count, uint32_t* words) {
    for (int64_t k = 0; k < count; ++k) words[k] = cell(state, static_cast<uint32_t>(first_bin + k));
}

// Calls run(first position, first bin of the chunk, count) for positions [position, position + count) of a block that
// starts on bin `start`.
template <class Run>
inline void rotated_runs(const SketchMap& map, int64_t start, int64_t position, int64_t count, const Run& run) {
    const int64_t low = map.ranges == 1 ? 0 : start - start % map.width, high = low + map.width;
    int64_t bin = start + position;
    if (bin >= high) bin -= map.width;
    const int64_t ahead = high - bin;
    if (count <= ahead) {
        run(position, bin, count);
    } else {
        run(position, bin, ahead);
        run(position + ahead, low, count - ahead);
    }
}

// ---- a stretch of a flat gradient ----------------------------------------------------------------------------------

// What the blocks of one group of kSigns share: words[chunks][chunk_dim] of signs, starts[chunks][kSigns] of the blocks.
inline void hash_group(const SketchMap& map, int64_t group, uint32_t* words, uint32_t* starts) {
    const uint32_t chunk_dim = static_cast<uint32_t>(map.chunk_dim());
    const uint64_t first = static_cast<uint64_t>(group) * kSigns;
    for (int64_t c = 0; c < map.chunks; ++c) {
        const Key sign = key_of(map.seed, map.kind, kSign, static_cast<uint32_t>(c));
        const Key start = key_of(map.seed, map.kind, kStart, static_cast<uint32_t>(c));
        sign_words(state_of(sign, static_cast<uint64_t>(group)), 0, chunk_dim, words + c * chunk_dim);
        for (int b = 0; b < kSigns; ++b)
            starts[c * kSigns + b] = below(cell(state_of(start, first + static_cast<uint64_t>(b)), 0), chunk_dim);
    }
}

template <class S>
void sketch_piece(const SketchPiece& piece, void* memory) {
    using T = typename Computes<S>::type;
    const SketchMap& map = piece.map;
    const int64_t chunk_dim = map.chunk_dim(), end = piece.begin + piece.count;
    T* widened = static_cast<T*>(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(widened + (sizeof(S) < sizeof(T) ? map.width : 0));
    uint32_t* starts = words + map.dim();
    T* bins = static_cast<T*>(piece.bins);
    int64_t group = -1, block = piece.begin / map.width;
    for (int64_t at = piece.begin; at < end; ++block) {
        const int64_t position = at - block * map.width;
        const int64_t count = end - at < map.width - position ? end - at : map.width - position;
        if (block / kSigns != group) hash_group(map, group = block / kSigns, words, starts);
        const S* source = static_cast<const S*>(piece.values) + (at - piece.begin);
        const T* values;
        if constexpr (sizeof(S) < sizeof(T)) {
            widen_row(source, count, widened);
            values = widened;
        } else {
            values = source;
        }
        const int bit = static_cast<int>(block % kSigns);
        for (int64_t c = 0; c < map.chunks; ++c) {
            const int64_t first = c * chunk_dim;
            rotated_runs(map, starts[c * kSigns + bit], position, count, [&](int64_t from, int64_t bin, int64_t run) {
                const auto add = c == 0 && sizeof(S) == sizeof(T) ? add_streamed<T> : add_run<T>;
                add(values + (from - position), words + first + bin, 31 - bit, run, bins + first + bin);
            });
        }
        at += count;
    }
}

// ---- a tile that a fused kernel holds --------------------------------------------------------------------------------

void plan_tile(const SketchMap& map, const SketchTile& tile, SketchPlan& plan) {
    SketchRun* next = plan.runs;
    uint32_t* flips = plan.flips;
    for (int64_t c = 0; c < map.chunks; ++c) {
        const Key start_key = key_of(map.seed, map.kind, kStart, static_cast<uint32_t>(c));
        const Key sign_key = key_of(map.seed, map.kind, kSign, static_cast<uint32_t>(c));
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t begin = (tile.row + r) * tile.inputs + tile.column;
            for (int64_t done = 0; done < tile.columns;) {
                const int64_t block = (begin + done) / map.width, position = begin + done - block * map.width;
                const int64_t left = tile.columns - done, room = map.width - position;
                const int64_t length = left < room ? left : room;
                const Key state = state_of(sign_key, static_cast<uint64_t>(block / kSigns));
                const int shift = 31 - static_cast<int>(block % kSigns);
                const int64_t start = below(cell(state_of(start_key, static_cast<uint64_t>(block)), 0),
                                            static_cast<uint32_t>(map.chunk_dim()));
                rotated_runs(map, start, position, length, [&](int64_t from, int64_t bin, int64_t count) {
                    for (int64_t k = 0; k < count; ++k)
                        flips[k] = cell(state, static_cast<uint32_t>(bin + k)) << shift & 0x80000000u;
                    flips += count;
                    *next++ = {static_cast<int32_t>(r * tile.stride + done + (from - position)),
                               static_cast<int32_t>(c * map.chunk_dim() + bin), static_cast<int32_t>(count)};
                });
                done += length;
            }
        }
    }
    plan.count = next - plan.runs;
}

template <class T>
void add_tile(const SketchPlan& plan, const void* values, void* bins) {
    const uint32_t* flips = plan.flips;
    for (int64_t i = 0; i < plan.count; ++i) {
        const SketchRun run = plan.runs[i];
        add_run(static_cast<const T*>(values) + run.entry, flips, 0, run.count, static_cast<T*>(bins) + run.bin);
        flips += run.count;
    }
}

// A tile holds sums, so it is float32 or float64 whatever the inputs were.
constexpr SketchKernels kSketchKernels[kDtypes] = {{sketch_piece<float>, plan_tile, add_tile<float>},
                                                   {sketch_piece<double>, plan_tile, add_tile<double>},
                                                   {sketch_piece<BFloat16>, plan_tile, add_tile<float>},
                                                   {sketch_piece<Float16>, plan_tile, add_tile<float>}};

}  // namespace
}  // namespace fillm
