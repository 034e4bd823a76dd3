// Driver of sample_moments: which samples are packed together, and who forms which rows of their gradients.
//
// A work item owns some rows of the gradients of all samples in hand, so what is summed over samples needs no lock, and
// each number is summed by one thread in an order that does not depend on how many there are. Rows of one gradient meet
// in the bins of a sketch: items next to each other form parts, cut by sizes alone; each part adds, item by item, into
// bins of its own, and the bins of the parts are added in order.
#include "sample_moments.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace fillm {
namespace {

constexpr int64_t kTokens = 2048;        // packed at a time, or one sample if it is longer
constexpr int64_t kBlockColumns = 2048;  // columns of x packed at a time: 16 MiB of float32
constexpr int64_t kDepth = 512;          // tokens in one running sum; more would lose digits of a long sample
constexpr int64_t kItemPanels = 2;       // panels of rows of the gradients an item owns
constexpr int64_t kSketchParts = 16;     // at most; as many threads can work on a sketch
constexpr int64_t kSketchBytes = int64_t{128} << 20;  // of bins of all parts and samples in hand, but for one of each
constexpr int64_t kBinsAtOnce = 4096;

const MomentsKernels* kernels_of(int instruction_set) {
#ifdef FILLM_X86
    if (instruction_set == 1) return avx2_moments();
    if (instruction_set == 2) return avx512_moments();
#endif
    return instruction_set == 0 ? generic_moments() : nullptr;
}

int64_t panels(int64_t count, int64_t size) { return (count + size - 1) / size; }

const void* at(const Operand& matrix, int64_t row, int64_t column) {
    if (!matrix.data) return nullptr;
    return static_cast<const unsigned char*>(matrix.data) + (row * matrix.row_stride + column) * itemsize_of(matrix.dtype);
}

struct Chunk {  // samples [first, last), their tokens [begin, end), columns of x [columns, columns_end)
    int64_t first, last, begin, end, columns, columns_end;
};

struct Shares {  // what an item has summed, [items, samples]
    std::vector<double> norms, dots;
};

// dy^T as the product's first factor: packing reads it column by column of dy.
MatmulArguments product_of(const MomentsArguments& g) {
    MatmulArguments product{};
    product.m = g.outputs, product.n = g.inputs, product.k = g.offsets[g.samples];
    product.a = {g.dy.data, g.dy.column_stride, g.dy.row_stride, g.dy.dtype};
    product.b = g.x;
    product.k_rows = g.rows;
    return product;
}

// tile = a b over `count` tokens of packed panels, kDepth at a time; `part` is as large as a tile.
template <class T>
void multiply(const MatmulKernels& matmul, const unsigned char* a, const unsigned char* b, int64_t count, void* tile,
              void* part) {
    matmul.multiply(a, b, std::min(count, kDepth), tile);
    for (int64_t done = kDepth; done < count; done += kDepth) {
        matmul.multiply(a + done * matmul.rows * sizeof(T), b + done * matmul.columns * sizeof(T),
                        std::min(count - done, kDepth), part);
        for (int64_t k = 0; k < int64_t{matmul.rows} * matmul.columns; ++k)
            static_cast<T*>(tile)[k] += static_cast<const T*>(part)[k];
    }
}

// `bins` are those of the item's part, [samples in hand, dim], or null.
void form_rows(const MomentsArguments& g, const MomentsKernels& kernels, const SketchKernels& sketch,
               const MatmulArguments& product, const Chunk& chunk, int64_t item, const unsigned char* packed_x,
               Shares& shares, unsigned char* bins) {
    const MatmulKernels& matmul = kernels.matmul;
    const int64_t size = itemsize_of(g.computes), tokens = chunk.end - chunk.begin;
    const int64_t row_begin = item * kItemPanels * matmul.rows;
    const int64_t row_end = std::min(g.outputs, row_begin + kItemPanels * matmul.rows);
    const int64_t a_bytes = tokens * matmul.rows * size, b_bytes = tokens * matmul.columns * size;
    unsigned char* packed_dy = static_cast<unsigned char*>(item_scratch(static_cast<size_t>(kItemPanels * a_bytes)));
    for (int64_t row = row_begin, p = 0; row < row_end; row += matmul.rows, ++p)
        matmul.pack_a(product, row, chunk.begin, chunk.end, packed_dy + p * a_bytes);
    alignas(64) unsigned char tile[14 * 2 * 64], part[sizeof tile];
    const auto form = g.computes == kFloat64 ? multiply<double> : multiply<float>;
    double no_dot = 0;
    SketchPlan plan{};
    if (bins) {
        const size_t room = static_cast<size_t>(plan_room(g.map, int64_t{matmul.rows} * matmul.columns));
        plan.runs = static_cast<SketchRun*>(thread_memory<2>(room * (sizeof(SketchRun) + sizeof(uint32_t))));
        plan.flips = reinterpret_cast<uint32_t*>(plan.runs + room);
    }
    for (int64_t column = chunk.columns, q = 0; column < chunk.columns_end; column += matmul.columns, ++q) {
        for (int64_t row = row_begin, p = 0; row < row_end; row += matmul.rows, ++p) {
            MomentsTile task{};
            task.rows = static_cast<int>(std::min<int64_t>(matmul.rows, row_end - row));
            task.columns = static_cast<int>(std::min<int64_t>(matmul.columns, chunk.columns_end - column));
            task.v = at(g.v, row, column), task.v_stride = g.v.row_stride;
            task.second = const_cast<void*>(at(g.second, row, column)), task.second_stride = g.second.row_stride;
            task.absolute = const_cast<void*>(at(g.absolute, row, column)), task.absolute_stride = g.absolute.row_stride;
            task.alpha = g.alpha;
            if (bins) sketch.plan(g.map, {matmul.columns, task.rows, task.columns, row, column, g.inputs}, plan);
            for (int64_t sample = chunk.first; sample < chunk.last; ++sample) {
                const int64_t from = g.offsets[sample] - chunk.begin, count = g.offsets[sample + 1] - g.offsets[sample];
                if (count == 0) continue;
                form(matmul, packed_dy + p * a_bytes + from * matmul.rows * size,
                     packed_x + q * b_bytes + from * matmul.columns * size, count, tile, part);
                task.norm = &shares.norms[static_cast<size_t>(item * g.samples + sample)];
                task.dot = g.dots ? &shares.dots[static_cast<size_t>(item * g.samples + sample)] : &no_dot;
                task.row_norms = g.row_norms ? g.row_norms + sample * g.outputs + row : nullptr;
                kernels.take(task, tile);
                if (bins) sketch.add(plan, tile, bins + (sample - chunk.first) * g.map.dim() * size);
            }
        }
    }
}

// sketches[samples in hand] = scale * (bins of part 0 + bins of part 1 + ...).
template <class T>
void add_parts(const MomentsArguments& g, const Chunk& chunk, int64_t parts, const unsigned char* memory) {
    const int64_t dim = g.map.dim(), entries = (chunk.last - chunk.first) * dim;
    const T* bins = reinterpret_cast<const T*>(memory);
    T* out = static_cast<T*>(g.sketches) + chunk.first * dim;
    const T scale = static_cast<T>(g.sketch_scale);
    parallel(entries, kBinsAtOnce, g.threads, [&](int64_t begin, int64_t end) {
        for (int64_t p = 0; p < parts; ++p)
            for (int64_t k = begin; k < end; ++k) out[k] += bins[p * entries + k];
        for (int64_t k = begin; k < end; ++k) out[k] *= scale;
    });
}

}  // namespace

void sample_moments(const MomentsArguments& g, const char* instruction_set) {
    const MomentsKernels& kernels = kernels_of(instruction_set_index(instruction_set))[g.computes == kFloat64];
    const MatmulArguments product = product_of(g);
    const int64_t size = itemsize_of(g.computes), items = panels(g.outputs, kItemPanels * kernels.matmul.rows);
    Shares shares;
    shares.norms.assign(static_cast<size_t>(items * g.samples), 0.0);
    if (g.dots) shares.dots.assign(static_cast<size_t>(items * g.samples), 0.0);
    if (g.row_norms) std::fill(g.row_norms, g.row_norms + g.samples * g.outputs, 0.0);
    const SketchKernels& sketch = sketch_kernels(g.computes, instruction_set);
    const int64_t bin_bytes = g.map.dim() * size;  // of one sample and part
    int64_t parts = items, most_samples = g.samples;
    if (g.sketches) {
        std::memset(g.sketches, 0, static_cast<size_t>(g.samples * bin_bytes));
        parts = std::min({items, kSketchParts, std::max<int64_t>(1, kSketchBytes / bin_bytes)});
        most_samples = std::max<int64_t>(1, kSketchBytes / (bin_bytes * std::max<int64_t>(1, parts)));
    }
    std::unique_ptr<unsigned char[]> bins;
    int64_t bins_for = 0;  // samples that `bins` have room for
    Chunk chunk{};
    for (chunk.first = 0; chunk.first < g.samples; chunk.first = chunk.last) {
        chunk.begin = g.offsets[chunk.first];
        chunk.last = chunk.first + 1;
        while (chunk.last < g.samples && g.offsets[chunk.last + 1] - chunk.begin <= kTokens &&
               chunk.last - chunk.first < most_samples)
            ++chunk.last;
        chunk.end = g.offsets[chunk.last];
        if (chunk.end == chunk.begin || items == 0 || g.inputs == 0) continue;
        const int64_t part_bytes = g.sketches ? (chunk.last - chunk.first) * bin_bytes : 0;
        if (g.sketches && chunk.last - chunk.first > bins_for) {
            bins_for = chunk.last - chunk.first;
            bins.reset(new unsigned char[static_cast<size_t>(parts * part_bytes)]);
        }
        for (chunk.columns = 0; chunk.columns < g.inputs; chunk.columns = chunk.columns_end) {
            chunk.columns_end = std::min(g.inputs, chunk.columns + kBlockColumns);
            const int64_t x_panels = panels(chunk.columns_end - chunk.columns, kernels.matmul.columns);
            const int64_t bytes = (chunk.end - chunk.begin) * kernels.matmul.columns * size;
            unsigned char* packed_x = static_cast<unsigned char*>(scratch(static_cast<size_t>(x_panels * bytes)));
            parallel(x_panels, 1, g.threads, [&](int64_t q, int64_t) {
                const int64_t column = chunk.columns + q * kernels.matmul.columns;
                kernels.matmul.pack_b(product, column, chunk.begin, chunk.end, packed_x + q * bytes);
            });
            parallel(parts, 1, g.threads, [&](int64_t part, int64_t) {
                unsigned char* own = g.sketches ? bins.get() + part * part_bytes : nullptr;
                if (own && chunk.columns == 0) std::memset(own, 0, static_cast<size_t>(part_bytes));
                for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item)
                    form_rows(g, kernels, sketch, product, chunk, item, packed_x, shares, own);
            });
        }
        if (g.sketches && g.computes == kFloat64) add_parts<double>(g, chunk, parts, bins.get());
        else if (g.sketches) add_parts<float>(g, chunk, parts, bins.get());
    }
    for (int64_t sample = 0; sample < g.samples; ++sample) {
        double norm = 0, dot = 0;
        for (int64_t item = 0; item < items; ++item) {
            norm += shares.norms[static_cast<size_t>(item * g.samples + sample)];
            if (g.dots) dot += shares.dots[static_cast<size_t>(item * g.samples + sample)];
        }
        g.norms[sample] = norm;
        if (g.dots) g.dots[sample] = dot;
    }
}

}  // namespace fillm
