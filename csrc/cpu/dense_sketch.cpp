// Driver of dense sketches: vectors are cut into pieces of coordinates and the map into panels of columns, by sizes
// alone; a piece's products are added up in the order of its coordinates, pieces in theirs. So the bits depend neither on
// the number of threads nor on the other vectors.
#include "dense_sketch.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace fillm {
namespace {

constexpr int64_t kPiece = 4096;           // coordinates; of 16 float vectors, a quarter of a megabyte
constexpr int64_t kMostPieces = 64;        // with sums of their own at a time
constexpr int64_t kHeldSums = 1 << 22;     // entries of those, if more than one piece has them
constexpr int64_t kMostRows = 256;         // of an item: the tile is made again for others, a tenth of the work
static_assert(kPiece % kTileCoordinates == 0, "tiles begin where pieces do");

const DenseKernels& kernels_of(Dtype dtype, const char* instruction_set) {
    const int index = instruction_set_index(instruction_set);
#ifdef FILLM_X86
    if (index == 1) return dense_avx2_kernels()[dtype];
    if (index == 2) return dense_avx512_kernels()[dtype];
#endif
    return index == 0 ? dense_generic_kernels()[dtype] : throw std::invalid_argument("no such kernels");
}

int64_t panels_of(int64_t dim) { return (dim + kTileColumns - 1) / kTileColumns; }

// Columns of a panel that are made: those there are, in pairs of vectors.
int64_t columns_of(int64_t dim, int64_t column, const DenseKernels& kernels) {
    const int64_t step = 2 * kernels.vector;
    return (std::min(kTileColumns, dim - column) + step - 1) / step * step;
}

// What one item adds up: samples [first, first + rows), whose values begin at coordinate `offset`, coordinates
// [begin, end), a panel of columns.
struct Item {
    int64_t first, rows, offset, begin, end, column;
};

// sums[rows, kTileColumns], written.
template <class T>
void sum_item(const DenseSketchArguments& arguments, const DenseKernels& kernels, const Item& item, T* sums) {
    const int64_t tile_entries = kTileCoordinates * kTileColumns;
    T* entries =
        static_cast<T*>(item_scratch(static_cast<size_t>(tile_entries + item.rows * kTileCoordinates) * sizeof(T)));
    const int64_t columns = columns_of(arguments.map.dim, item.column, kernels);
    std::fill(sums, sums + item.rows * kTileColumns, T(0));
    uint64_t coordinates[kTileCoordinates];
    for (int64_t begin = item.begin; begin < item.end; begin += kTileCoordinates) {
        const int64_t count = std::min(kTileCoordinates, item.end - begin);
        std::iota(coordinates, coordinates + count, static_cast<uint64_t>(begin));
        const DenseTile tile{arguments.map, coordinates, count, item.column, columns, entries};
        kernels.tile(tile);
        const int64_t at = item.first * arguments.stride + (begin - item.offset);
        const void* values = static_cast<const unsigned char*>(arguments.values) + at * itemsize_of(arguments.dtype);
        kernels.add(tile, {values, arguments.stride, item.rows, entries + tile_entries, sums});
    }
}

template <class T>
void sketch_into(const DenseSketchArguments& arguments, const DenseKernels& kernels) {
    const int64_t dim = arguments.map.dim, samples = arguments.samples, panels = panels_of(dim);
    const int64_t groups = (samples + kMostRows - 1) / kMostRows;
    const int64_t end = arguments.offset + arguments.count, slot = samples * kTileColumns;
    const int64_t first = arguments.offset / kPiece, last = arguments.count ? (end + kPiece - 1) / kPiece : first;
    const int64_t held = std::max<int64_t>(1, std::min(kMostPieces, kHeldSums / std::max<int64_t>(1, panels * slot)));
    T* out = static_cast<T*>(arguments.out);
    T* slots = static_cast<T*>(scratch(static_cast<size_t>(std::min(held, last - first) * panels * slot) * sizeof(T)));
    std::fill(out, out + samples * dim, T(0));
    for (int64_t p = first; p < last; p += held) {
        const int64_t pieces = std::min(held, last - p);
        // Panels of a piece go next to each other: they read the same values.
        parallel(pieces * groups * panels, 1, arguments.threads, [&](int64_t index, int64_t) {
            const int64_t panel = index % panels, group = index / panels % groups, piece = p + index / panels / groups;
            const Item item{group * kMostRows, std::min(kMostRows, samples - group * kMostRows), arguments.offset,
                            std::max(piece * kPiece, arguments.offset), std::min((piece + 1) * kPiece, end),
                            panel * kTileColumns};
            sum_item(arguments, kernels, item,
                     slots + ((piece - p) * panels + panel) * slot + item.first * kTileColumns);
        });
        parallel(samples, 1, arguments.threads, [&](int64_t sample, int64_t) {
            for (int64_t i = 0; i < pieces * panels; ++i) {
                const int64_t column = i % panels * kTileColumns, columns = std::min(kTileColumns, dim - column);
                const T* sums = slots + i * slot + sample * kTileColumns;
                for (int64_t c = 0; c < columns; ++c) out[sample * dim + column + c] += sums[c];
            }
        });
    }
    const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(dim)));
    for (int64_t k = 0; k < samples * dim; ++k) out[k] *= scale;
}

// Rows next to each other that begin at the same coordinate.
struct Run {
    int64_t first, rows, offset;
};

// At most kMostRows in a run.
std::vector<Run> runs_of(const int64_t* offsets, int64_t samples) {
    std::vector<Run> runs;
    for (int64_t row = 0; row < samples; ++row) {
        if (!runs.empty() && runs.back().offset == offsets[row] && runs.back().rows < kMostRows) ++runs.back().rows;
        else runs.push_back({row, 1, offsets[row]});
    }
    return runs;
}

// Every row from a coordinate of its own; bits are those of the row alone. Items are a run and a panel: runs are many.
template <class T>
void sketch_runs_into(const DenseSketchArguments& arguments, const DenseKernels& kernels) {
    const int64_t dim = arguments.map.dim, panels = panels_of(dim);
    const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(dim)));
    const std::vector<Run> runs = runs_of(arguments.row_offsets, arguments.samples);
    parallel(static_cast<int64_t>(runs.size()) * panels, 1, arguments.threads, [&](int64_t index, int64_t) {
        const Run run = runs[static_cast<size_t>(index / panels)];
        const int64_t column = index % panels * kTileColumns, columns = std::min(kTileColumns, dim - column);
        const int64_t end = run.offset + arguments.count;
        T* sums = static_cast<T*>(thread_memory<2>(static_cast<size_t>(run.rows * kTileColumns) * sizeof(T)));
        T* out = static_cast<T*>(arguments.out) + run.first * dim + column;
        for (int64_t r = 0; r < run.rows; ++r) std::fill(out + r * dim, out + r * dim + columns, T(0));
        for (int64_t begin = run.offset; begin < end; begin = (begin / kPiece + 1) * kPiece) {
            const int64_t stop = std::min((begin / kPiece + 1) * kPiece, end);
            sum_item(arguments, kernels, Item{run.first, run.rows, run.offset, begin, stop, column}, sums);
            for (int64_t r = 0; r < run.rows; ++r)
                for (int64_t c = 0; c < columns; ++c) out[r * dim + c] += sums[r * kTileColumns + c];
        }
        for (int64_t r = 0; r < run.rows; ++r)
            for (int64_t c = 0; c < columns; ++c) out[r * dim + c] *= scale;
    });
}

template <class T>
void rows_into(const DenseMap& map, const int64_t* coordinates, int64_t count, T* out, int64_t stride,
               int threads, const DenseKernels& kernels) {
    const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(map.dim)));
    parallel(count, kTileCoordinates, threads, [&](int64_t begin, int64_t end) {
        T* entries = static_cast<T*>(item_scratch(static_cast<size_t>(kTileCoordinates * kTileColumns) * sizeof(T)));
        const uint64_t* own = reinterpret_cast<const uint64_t*>(coordinates) + begin;
        for (int64_t column = 0; column < map.dim; column += kTileColumns) {
            kernels.tile({map, own, end - begin, column, columns_of(map.dim, column, kernels), entries});
            const int64_t columns = std::min(kTileColumns, map.dim - column);
            for (int64_t q = 0; q < end - begin; ++q)
                for (int64_t c = 0; c < columns; ++c)
                    out[(begin + q) * stride + column + c] = entries[q * kTileColumns + c] * scale;
        }
    });
}

}  // namespace

void sketch_dense(const DenseSketchArguments& arguments, const char* instruction_set) {
    const DenseKernels& kernels = kernels_of(arguments.dtype, instruction_set);
    if (arguments.row_offsets != nullptr) {
        if (arguments.dtype == kFloat64) sketch_runs_into<double>(arguments, kernels);
        else sketch_runs_into<float>(arguments, kernels);
    } else if (arguments.dtype == kFloat64) sketch_into<double>(arguments, kernels);
    else sketch_into<float>(arguments, kernels);
}

void dense_rows(const DenseMap& map, const int64_t* coordinates, int64_t count, void* out, int64_t stride, Dtype dtype,
                int threads, const char* instruction_set) {
    const DenseKernels& kernels = kernels_of(dtype, instruction_set);
    if (dtype == kFloat64) rows_into(map, coordinates, count, static_cast<double*>(out), stride, threads, kernels);
    else rows_into(map, coordinates, count, static_cast<float*>(out), stride, threads, kernels);
}

}  // namespace fillm
