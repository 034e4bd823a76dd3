// Driver of factored_sketch: rows are projected a block at a time, then multiplied sample by sample.
//
// A row's projection depends on the row alone, and a sample's products are added up token by token, so neither blocks
// nor threads nor neighbours change a bit.
#include "factored_sketch.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "dense_sketch.h"
#include "instruction_sets.h"
#include "matmul.h"
#include "parallel.h"
#include "seed_law.h"

namespace fillm {
namespace {

constexpr int64_t kBlockEntries = 1 << 21;  // projected entries held at a time
constexpr int64_t kTilesAtOnce = 4, kStrip = 32;

// Maps of `dim` bins in `chunks` equal parts, one map a seed.
struct NarrowMaps {
    const uint64_t* seeds;
    int64_t maps, dim, chunks;
    uint32_t kind;
};

// Where coordinates [first, first + count) are added to, [count][maps][chunks]: the seed law's BlockMap, each block
// hashed once.
std::vector<Placement> placements_of(const NarrowMaps& of, int64_t first, int64_t count, int threads) {
    const int64_t chunk = of.dim / of.chunks, group = kSigns * chunk, nonzeros = of.maps * of.chunks;
    std::vector<Placement> table(static_cast<size_t>(count * nonzeros));
    const int64_t last = first + count, low = first / group, groups = (last + group - 1) / group - low;
    const auto place_group = [&](int64_t g, int64_t m, int64_t c, uint32_t* words) {
        const Key start = key_of(of.seeds[m], of.kind, kStart, static_cast<uint32_t>(c));
        const Key sign = state_of(key_of(of.seeds[m], of.kind, kSign, static_cast<uint32_t>(c)),
                                  static_cast<uint64_t>(g));
        for (int64_t k = 0; k < chunk; ++k) words[k] = cell(sign, static_cast<uint32_t>(k));
        const int64_t base = m * padded_side(of.dim) + c * chunk, end = std::min((g + 1) * group, last);
        Placement* out = table.data() + m * of.chunks + c;
        for (int64_t at = std::max(g * group, first); at < end;) {
            const int64_t block = at / chunk, stop = std::min((block + 1) * chunk, end);
            const int64_t shift = 31 - block % kSigns;
            int64_t bin = below(cell(state_of(start, static_cast<uint64_t>(block)), 0), static_cast<uint32_t>(chunk));
            for (bin = (bin + at % chunk) % chunk; at < stop; ++at, bin = bin + 1 == chunk ? 0 : bin + 1)
                out[(at - first) * nonzeros] = {static_cast<uint32_t>(base + bin), words[bin] << shift & 0x80000000u};
        }
    };
    parallel(groups, std::max<int64_t>(1, 4096 / group), threads, [&](int64_t from, int64_t to) {
        std::vector<uint32_t> words(static_cast<size_t>(chunk));
        for (int64_t g = from; g < to; ++g)
            for (int64_t m = 0; m < of.maps; ++m)
                for (int64_t c = 0; c < of.chunks; ++c) place_group(low + g, m, c, words.data());
    });
    return table;
}

// Rows of Gaussian maps side by side, [count, maps, padded_side(dim)], zeros in the padding.
std::vector<unsigned char> entries_of(const NarrowMaps& of, int64_t count, Dtype computes, int threads,
                                      const char* instruction_set) {
    const int64_t stride = of.maps * padded_side(of.dim), item = itemsize_of(computes);
    std::vector<unsigned char> entries(static_cast<size_t>(count * stride * item));
    std::vector<int64_t> coordinates(static_cast<size_t>(count));
    std::iota(coordinates.begin(), coordinates.end(), int64_t{0});
    for (int64_t m = 0; m < of.maps; ++m)
        dense_rows({of.seeds[m], of.kind, of.dim}, coordinates.data(), count,
                   entries.data() + m * padded_side(of.dim) * item, stride, computes, threads, instruction_set);
    return entries;
}

template <class T>
void add_rows(const T* rows, int64_t count, int64_t padded, int64_t dim, T* out) {
    for (int64_t r = 0; r < count; ++r)
        for (int64_t k = 0; k < dim; ++k) out[r * dim + k] += rows[r * padded + k];
}

template <class T>
void scale_all(T* values, int64_t count, T scale) {
    for (int64_t k = 0; k < count; ++k) values[k] *= scale;
}

double scale_of(const FactoredSide& side) {
    return side.chunks == 4 ? 0.5 : side.chunks == 1 ? 1.0 : 0.70710678118654752440;
}

}  // namespace

const FactoredKernels& factored_kernels(Dtype dtype, const char* instruction_set) {
    const int index = instruction_set_index(instruction_set);
#ifdef FILLM_X86
    if (index == 1) return factored_avx2_kernels()[dtype];
    if (index == 2) return factored_avx512_kernels()[dtype];
#endif
    return index == 0 ? factored_generic_kernels()[dtype] : throw std::invalid_argument("no such kernels");
}

void factored_sketch(const FactoredSketchArguments& arguments, const char* instruction_set) {
    const FactoredKernels& kernels = factored_kernels(arguments.dtype, instruction_set);
    const FactoredSide(&sides)[2] = arguments.sides;
    const bool dense = arguments.kind == kGaussian;
    for (const FactoredSide& side : sides)
        if (!dense && side.chunks != 1 && side.chunks != 2 && side.chunks != 4)
            throw std::invalid_argument("chunks: 1, 2 or 4");
    const int64_t maps = arguments.maps, rows = arguments.samples ? arguments.offsets[arguments.samples] : 0;
    const int64_t k_out = sides[0].dim, k_in = sides[1].dim, item = arguments.dtype == kFloat64 ? 8 : 4;
    const Dtype computes = item == 8 ? kFloat64 : kFloat32;
    int64_t padded[2];
    std::vector<Placement> placements[2];
    std::vector<unsigned char> entries[2];
    for (int s = 0; s < 2; ++s) {
        padded[s] = maps * padded_side(sides[s].dim);
        const NarrowMaps of{sides[s].seeds, maps, sides[s].dim, sides[s].chunks, arguments.kind};
        if (dense) entries[s] = entries_of(of, sides[s].rows.columns, computes, arguments.threads, instruction_set);
        else placements[s] = placements_of(of, 0, sides[s].rows.columns, arguments.threads);
    }
    std::fill_n(static_cast<unsigned char*>(arguments.out), arguments.samples * maps * k_out * k_in * item, 0);

    const int64_t lanes = kernels.lanes;
    const int64_t step = std::max(lanes, kBlockEntries / (padded[0] + padded[1]) / lanes * lanes);
    const int64_t held = std::min(step, rows);
    unsigned char* projected[2];
    projected[0] =
        static_cast<unsigned char*>(kept_scratch(static_cast<size_t>(held * (padded[0] + padded[1]) * item)));
    projected[1] = projected[0] + held * padded[0] * item;

    int64_t first = 0;  // the first sample that has rows in the block
    for (int64_t begin = 0; begin < rows; begin += step) {
        const int64_t end = std::min(begin + step, rows), tiles = (end - begin + lanes - 1) / lanes;
        const auto from_row = [&](int s, int64_t row) {
            const Matrix& matrix = sides[s].rows;
            return static_cast<const unsigned char*>(matrix.data) +
                   (begin + row) * matrix.stride * itemsize_of(arguments.dtype);
        };
        for (int s = 0; dense && s < 2; ++s) {
            MatmulArguments g{};
            g.m = end - begin, g.n = padded[s], g.k = sides[s].rows.columns;
            g.a = {from_row(s, 0), sides[s].rows.stride, 1, arguments.dtype};
            g.b = {entries[s].data(), padded[s], 1, computes};
            g.alpha = 1, g.out = projected[s], g.out_row_stride = padded[s], g.out_column_stride = 1;
            g.computes = computes, g.threads = arguments.threads;
            matmul(g, instruction_set);
        }
        parallel(dense ? 0 : 2 * tiles, kTilesAtOnce, arguments.threads, [&](int64_t from, int64_t to) {
            void* bins = item_scratch(static_cast<size_t>(std::max(padded[0], padded[1]) * lanes * item));
            for (int64_t i = from; i < to; ++i) {
                const int s = i < tiles ? 0 : 1;
                const int64_t row = (s ? i - tiles : i) * lanes;
                const Matrix& matrix = sides[s].rows;
                kernels.project({from_row(s, row), matrix.stride, matrix.columns, std::min(lanes, end - begin - row),
                                 placements[s].data(), maps * sides[s].chunks, padded[s], scale_of(sides[s]), bins,
                                 projected[s] + row * padded[s] * item});
            }
        });
        while (first < arguments.samples && arguments.offsets[first + 1] <= begin) ++first;
        int64_t last = first;
        while (last < arguments.samples && arguments.offsets[last] < end) ++last;
        const int64_t strips = (k_out + kStrip - 1) / kStrip;
        parallel((last - first) * maps * strips, 4, arguments.threads, [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; ++i) {
                const int64_t sample = first + i / (maps * strips), m = i / strips % maps, row = i % strips * kStrip;
                const int64_t low = std::max(arguments.offsets[sample], begin) - begin;
                const int64_t high = std::min(arguments.offsets[sample + 1], end) - begin;
                const int64_t left = low * padded[0] + m * padded_side(k_out) + row;
                const int64_t right = low * padded[1] + m * padded_side(k_in);
                const int64_t out = ((sample * maps + m) * k_out + row) * k_in;
                kernels.multiply({projected[0] + left * item, projected[1] + right * item, padded[0], padded[1],
                                  high - low, std::min(kStrip, k_out - row), k_in,
                                  static_cast<unsigned char*>(arguments.out) + out * item});
            }
        });
    }
}

void sketch_narrow(const SketchArguments& arguments, int64_t piece, const char* instruction_set) {
    const FactoredKernels& kernels = factored_kernels(arguments.dtype, instruction_set);
    const SketchMap& map = arguments.map;
    const NarrowMaps of{&map.seed, 1, map.dim(), map.chunks, map.kind};
    const int64_t dim = map.dim(), padded = padded_side(dim), lanes = kernels.lanes;
    const int64_t last = arguments.offset + arguments.count;
    const int64_t item = arguments.dtype == kFloat64 ? 8 : 4, tiles = (arguments.samples + lanes - 1) / lanes;
    std::fill_n(static_cast<unsigned char*>(arguments.out), arguments.samples * dim * item, 0);
    for (int64_t begin = arguments.offset; begin < last;) {
        const int64_t end = std::min((begin / piece + 1) * piece, last);
        const std::vector<Placement> placements = placements_of(of, begin, end - begin, arguments.threads);
        parallel(tiles, kTilesAtOnce, arguments.threads, [&](int64_t from, int64_t to) {
            const int64_t bytes = padded * lanes * item;
            unsigned char* bins = static_cast<unsigned char*>(item_scratch(static_cast<size_t>(2 * bytes)));
            unsigned char* projected = bins + bytes;
            for (int64_t row = from * lanes; row < std::min(to * lanes, arguments.samples); row += lanes) {
                const int64_t count = std::min(lanes, arguments.samples - row);
                const int64_t at = row * arguments.stride + (begin - arguments.offset);
                const void* values =
                    static_cast<const unsigned char*>(arguments.values) + at * itemsize_of(arguments.dtype);
                kernels.project({values, arguments.stride, end - begin, count, placements.data(), map.chunks, padded,
                                 1.0, bins, projected});
                if (item == 8) {
                    add_rows(reinterpret_cast<const double*>(projected), count, padded, dim,
                             static_cast<double*>(arguments.out) + row * dim);
                } else {
                    add_rows(reinterpret_cast<const float*>(projected), count, padded, dim,
                             static_cast<float*>(arguments.out) + row * dim);
                }
            }
        });
        begin = end;
    }
    const int64_t all = arguments.samples * dim;
    if (item == 8) scale_all(static_cast<double*>(arguments.out), all, arguments.scale);
    else scale_all(static_cast<float*>(arguments.out), all, static_cast<float>(arguments.scale));
}

}  // namespace fillm
