// Driver of TensorSketch: gradients of a vector of samples are formed, some rows at a time, and folded into bins; and
// count sketches of single rows, for who goes through their transforms.
//
// A lane is a sample's own and work is cut by sizes alone, so bits depend neither on threads nor on neighbours.
#include <algorithm>
#include <vector>

#include "factored_sketch.h"
#include "matmul.h"
#include "parallel.h"
#include "seed_law.h"

namespace fillm {
namespace {

constexpr uint32_t kTensorSketch = 5;  // position in KINDS
constexpr int64_t kRows = 42, kColumns = 128;         // of the blocks that are formed: whole panels of any matrix product
constexpr int64_t kMostParts = 4, kEntriesABin = 8;   // of the rows of gradients, each with bins of its own
constexpr int64_t kHeldBins = 1 << 24;                // at a time, if one group of samples has not more

// Bin and sign of every coordinate of a side, the seed law's 9.
std::vector<Placement> placements_of(uint64_t seed, int side, int64_t width, int64_t dim) {
    const Key start = key_of(seed, kTensorSketch, kStart, static_cast<uint32_t>(side));
    const Key sign = key_of(seed, kTensorSketch, kSign, static_cast<uint32_t>(side));
    std::vector<Placement> places(static_cast<size_t>(width));
    uint32_t word = 0;
    for (int64_t q = 0; q < width; ++q) {
        if (q % kSigns == 0) word = cell(state_of(sign, static_cast<uint64_t>(q / kSigns)), 0);
        places[q] = {below(cell(state_of(start, static_cast<uint64_t>(q)), 0), static_cast<uint32_t>(dim)),
                     word << (31 - q % kSigns) & 0x80000000u};
    }
    return places;
}

// Where all coordinates of a side fall, [maps, width].
std::vector<Placement> placements_of(const TensorSketchArguments& arguments, int side) {
    std::vector<Placement> all;
    for (int64_t m = 0; m < arguments.maps; ++m) {
        const std::vector<Placement> one =
            placements_of(arguments.seeds[m], side, arguments.sides[side].columns, arguments.dim);
        all.insert(all.end(), one.begin(), one.end());
    }
    return all;
}

// A block of one sample's gradient, written to out[rows, columns].
template <class T>
void form(const TensorSketchArguments& arguments, int64_t sample, int64_t row, int64_t rows, int64_t column,
          int64_t columns, T* out, const char* instruction_set) {
    const int64_t begin = arguments.offsets[sample], tokens = arguments.offsets[sample + 1] - begin;
    const auto entry = [&](const Matrix& matrix, int64_t at) {
        return static_cast<const unsigned char*>(matrix.data) +
               (begin * matrix.stride + at) * itemsize_of(arguments.dtype);
    };
    const Matrix &dy = arguments.sides[0], &x = arguments.sides[1];
    MatmulArguments g{};
    g.m = rows, g.n = columns, g.k = tokens;
    g.a = {entry(dy, row), 1, dy.stride, arguments.dtype};
    g.b = {entry(x, column), x.stride, 1, arguments.dtype};
    g.alpha = 1, g.out = out, g.out_row_stride = columns, g.out_column_stride = 1;
    g.computes = sizeof(T) == 8 ? kFloat64 : kFloat32, g.threads = 1;
    matmul(g, instruction_set);
}

template <class T>
void sketch_samples(const TensorSketchArguments& arguments, const char* instruction_set) {
    const FactoredKernels& kernels = factored_kernels(arguments.dtype, instruction_set);
    const Matrix &dy = arguments.sides[0], &x = arguments.sides[1];
    const int64_t dim = arguments.dim, maps = arguments.maps, lanes = kernels.lanes, outputs = dy.columns;
    const std::vector<Placement> rows_at = placements_of(arguments, 0), columns_at = placements_of(arguments, 1);

    // Bins of their own for parts of the rows, where adding those up is little beside the entries.
    const int64_t worth = std::clamp<int64_t>(outputs * x.columns / (kEntriesABin * dim), 1, kMostParts);
    const int64_t part_rows = std::max<int64_t>(1, (outputs + worth - 1) / worth);
    const int64_t parts = std::max<int64_t>(1, (outputs + part_rows - 1) / part_rows);
    const int64_t slot = maps * 2 * dim * lanes, groups = (arguments.samples + lanes - 1) / lanes;
    const int64_t held = std::max<int64_t>(1, std::min(groups, kHeldBins / (parts * slot)));
    T* slots = static_cast<T*>(kept_scratch(static_cast<size_t>(held * parts * slot) * sizeof(T)));
    for (int64_t first = 0; first < groups; first += held) {
        const int64_t now = std::min(held, groups - first);
        const auto samples_of = [&](int64_t group) { return std::min(lanes, arguments.samples - group * lanes); };
        parallel(now * parts, 1, arguments.threads, [&](int64_t item, int64_t) {
            const int64_t group = first + item / parts, end = std::min(outputs, (item % parts + 1) * part_rows);
            T* bins = slots + item * slot;
            std::fill(bins, bins + slot, T(0));
            T* formed = static_cast<T*>(item_scratch(static_cast<size_t>(lanes * kRows * kColumns) * sizeof(T)));
            for (int64_t row = item % parts * part_rows; row < end; row += kRows) {
                const int64_t rows = std::min(kRows, end - row);
                for (int64_t column = 0; column < x.columns; column += kColumns) {
                    const int64_t columns = std::min(kColumns, x.columns - column);
                    for (int64_t s = 0; s < samples_of(group); ++s)
                        form<T>(arguments, group * lanes + s, row, rows, column, columns, formed + s * kRows * kColumns,
                                instruction_set);
                    kernels.fold({formed, kRows * kColumns, samples_of(group), rows, columns, rows_at.data() + row,
                                  outputs, columns_at.data() + column, x.columns, maps, dim, bins});
                }
            }
        });
        parallel(now * maps, 1, arguments.threads, [&](int64_t item, int64_t) {
            const int64_t group = item / maps, m = item % maps;
            T* out = static_cast<T*>(arguments.out) + ((first + group) * lanes * maps + m) * dim;
            kernels.unfold({slots + group * parts * slot + m * 2 * dim * lanes, parts, slot, dim,
                            samples_of(first + group), out, maps * dim});
        });
    }
}

}  // namespace

void tensorsketch(const TensorSketchArguments& arguments, const char* instruction_set) {
    if (arguments.dtype == kFloat64) sketch_samples<double>(arguments, instruction_set);
    else sketch_samples<float>(arguments, instruction_set);
}

void count_sketch(const CountSketchArguments& arguments, const char* instruction_set) {
    const FactoredKernels& kernels = factored_kernels(arguments.dtype, instruction_set);
    const int64_t padded = padded_side(arguments.dim), lanes = kernels.lanes;
    const int64_t item = arguments.dtype == kFloat64 ? 8 : 4;
    const Matrix& matrix = arguments.rows;
    const std::vector<Placement> placements =
        placements_of(arguments.seed, arguments.side, matrix.columns, arguments.dim);
    parallel(arguments.count, lanes, arguments.threads, [&](int64_t begin, int64_t end) {
        void* bins = item_scratch(static_cast<size_t>(padded * lanes * item));
        const int64_t at = begin * matrix.stride * itemsize_of(arguments.dtype);
        kernels.project({static_cast<const unsigned char*>(matrix.data) + at, matrix.stride, matrix.columns,
                         end - begin, placements.data(), 1, padded, 1.0, bins,
                         static_cast<unsigned char*>(arguments.out) + begin * padded * item});
    });
}

}  // namespace fillm
