// Driver of the matrix product: which blocks are packed when, and who multiplies them.
//
// Blocks of `a` and `b` are packed by all threads, then tiles of the result are taken by whoever is free. Every entry
// of the result is summed by one thread at a time in the order of k, so its bits do not depend on the number of threads.
#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace fillm {
namespace {

constexpr int64_t kDepth = 256;         // terms a tile sums: a panel of `b` stays in the L1 cache
constexpr int64_t kBlockRows = 2048;    // rows of `a` packed at a time: 2 MiB of float32
constexpr int64_t kBlockColumns = 4096; // columns of `b` packed at a time: 4 MiB of float32
constexpr int64_t kItemPanels = 4;      // panels of either side a work item multiplies

const MatmulKernels* kernels_of(int instruction_set) {
#ifdef FILLM_X86
    if (instruction_set == 1) return avx2_matmul();
    if (instruction_set == 2) return avx512_matmul();
#endif
    return instruction_set == 0 ? generic_matmul() : nullptr;
}

int64_t panels(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Asks for what the tile at (m, n) will be added to or multiplied with, so that it has arrived when the tile is done.
void prefetch(const MatmulArguments& g, const MatmulKernels& kernels, int64_t m, int64_t n) {
    const bool dots = g.dots != nullptr;
    const int64_t row_stride = dots ? g.other.row_stride : g.out_row_stride;
    const int64_t column_stride = dots ? g.other.column_stride : g.out_column_stride;
    const int64_t size = itemsize_of(dots ? g.other.dtype : g.computes);
    const unsigned char* data = static_cast<const unsigned char*>(dots ? g.other.data : g.out);
    if (column_stride != 1) return;
    const int64_t bytes = std::min<int64_t>(kernels.columns, g.n - n) * size;
    for (int64_t i = m; i < std::min(g.m, m + kernels.rows); ++i) {
        const unsigned char* row = data + ((dots && g.m_rows ? g.m_rows[i] : i) * row_stride + n) * size;
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
    }
}

struct Block {
    int64_t m_begin, m_end, n_begin, n_end, k_begin, k_end;
};

void multiply_block(const MatmulArguments& g, const MatmulKernels& kernels, const Block& block, unsigned char* packed_a,
                    unsigned char* packed_b, double* dots) {
    const int64_t depth = block.k_end - block.k_begin, size = itemsize_of(g.computes);
    const int64_t a_panels = panels(block.m_end - block.m_begin, kernels.rows);
    const int64_t b_panels = panels(block.n_end - block.n_begin, kernels.columns);
    const int64_t a_bytes = depth * kernels.rows * size, b_bytes = depth * kernels.columns * size;
    parallel(a_panels + b_panels, kItemPanels, g.threads, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t q = p - a_panels;
            if (q < 0) kernels.pack_a(g, block.m_begin + p * kernels.rows, block.k_begin, block.k_end, packed_a + p * a_bytes);
            else kernels.pack_b(g, block.n_begin + q * kernels.columns, block.k_begin, block.k_end, packed_b + q * b_bytes);
        }
    });
    const int64_t down = panels(a_panels, kItemPanels), across = panels(b_panels, kItemPanels);
    parallel(down * across, 1, g.threads, [&](int64_t item, int64_t) {
        alignas(64) unsigned char tile[14 * 2 * 64];
        const int64_t p_begin = item / across * kItemPanels, q_begin = item % across * kItemPanels;
        double* own_dots = g.dots ? dots + item % across * (block.m_end - block.m_begin) - block.m_begin : nullptr;
        for (int64_t q = q_begin; q < std::min(b_panels, q_begin + kItemPanels); ++q) {
            for (int64_t p = p_begin; p < std::min(a_panels, p_begin + kItemPanels); ++p) {
                const int64_t m = block.m_begin + p * kernels.rows, n = block.n_begin + q * kernels.columns;
                prefetch(g, kernels, m, n);
                kernels.multiply(packed_a + p * a_bytes, packed_b + q * b_bytes, depth, tile);
                if (g.dots) kernels.add_to_dots(g, m, n, tile, own_dots);
                else kernels.add_to_out(g, m, n, block.k_begin == 0, tile);
            }
        }
    });
}

// What a product of no terms leaves: the bias, zeros, or what was there.
void without_terms(const MatmulArguments& g) {
    if (g.dots) std::fill(g.dots, g.dots + g.m, 0.0);
    if (!g.out || g.accumulate) return;
    const int64_t size = itemsize_of(g.computes);
    for (int64_t i = 0; i < g.m; ++i) {
        for (int64_t j = 0; j < g.n; ++j) {
            unsigned char* entry = static_cast<unsigned char*>(g.out) + (i * g.out_row_stride + j * g.out_column_stride) * size;
            if (g.bias) std::memcpy(entry, static_cast<const unsigned char*>(g.bias) + j * size, static_cast<size_t>(size));
            else std::memset(entry, 0, static_cast<size_t>(size));
        }
    }
}

}  // namespace

void matmul(const MatmulArguments& g, const char* instruction_set) {
    if (g.out && g.out_column_stride != 1 && g.out_row_stride == 1 && !g.bias && !g.m_rows) {
        MatmulArguments turned = g;  // out^T = b^T a^T is written along its rows
        std::swap(turned.m, turned.n);
        std::swap(turned.out_row_stride, turned.out_column_stride);
        turned.a = {g.b.data, g.b.column_stride, g.b.row_stride, g.b.dtype};
        turned.b = {g.a.data, g.a.column_stride, g.a.row_stride, g.a.dtype};
        return matmul(turned, instruction_set);
    }
    const MatmulKernels& kernels = kernels_of(instruction_set_index(instruction_set))[g.computes == kFloat64];
    if (g.k == 0 || g.n == 0 || g.m == 0) return without_terms(g);
    const int64_t depth = std::min(g.k, kDepth), size = itemsize_of(g.computes);
    const int64_t block_rows = kBlockRows / kernels.rows * kernels.rows;
    const int64_t a_rows = panels(std::min(g.m, block_rows), kernels.rows) * kernels.rows;
    const int64_t b_columns = panels(std::min(g.n, kBlockColumns), kernels.columns) * kernels.columns;
    const int64_t a_bytes = (depth * a_rows * size + 63) / 64 * 64;
    unsigned char* packed = static_cast<unsigned char*>(scratch(static_cast<size_t>(a_bytes + depth * b_columns * size)));
    const int64_t items_across = panels(std::min(g.n, kBlockColumns), kernels.columns * kItemPanels);
    std::vector<double> dots;
    for (int64_t m = 0; m < g.m; m += block_rows) {
        const int64_t m_end = std::min(g.m, m + block_rows);
        if (g.dots) dots.assign(static_cast<size_t>(items_across * (m_end - m)), 0.0);
        for (int64_t n = 0; n < g.n; n += kBlockColumns) {
            for (int64_t k = 0; k < g.k; k += kDepth) {
                const Block block{m, m_end, n, std::min(g.n, n + kBlockColumns), k, std::min(g.k, k + kDepth)};
                multiply_block(g, kernels, block, packed, packed + a_bytes, dots.data());
            }
        }
        for (int64_t i = m; g.dots && i < m_end; ++i) {
            double sum = 0;
            for (int64_t item = 0; item < items_across; ++item) sum += dots[static_cast<size_t>(item * (m_end - m) + i - m)];
            g.dots[i] = sum;
        }
    }
}

}  // namespace fillm
