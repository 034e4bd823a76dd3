// Driver of ghost_norm: which rows count, which form each sample takes, who computes what, and in which order it adds up.
//
//     |dy_b^T x_b|^2 = sum_{t,s} (x_t . x_s)(dy_t . dy_s)    docs/method.md (4); Goodfellow 2015, arXiv 1510.01799
//
// Work is cut by sizes alone, never by the number of threads; every item writes its own slot and the slots of a sample
// are added in order. So the bits of the result depend on the instruction set and on nothing else.
#include "ghost_norm.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace fillm {
namespace {

template <class Bits>
bool any_nonzero(const Bits* row, int64_t count) {
    constexpr Bits magnitude = static_cast<Bits>(~Bits(0)) >> 1;  // all but the sign
    constexpr int64_t chunk = 128;
    for (int64_t begin = 0; begin < count; begin += chunk) {
        const int64_t end = std::min(count, begin + chunk);
        Bits seen = 0;
        for (int64_t k = begin; k < end; ++k) seen = static_cast<Bits>(seen | row[k]);
        if (seen & magnitude) return true;
    }
    return false;
}

bool any_nonzero(const void* row, int64_t count, int itemsize) {
    switch (itemsize) {
        case 2: return any_nonzero(static_cast<const uint16_t*>(row), count);
        case 4: return any_nonzero(static_cast<const uint32_t*>(row), count);
        default: return any_nonzero(static_cast<const uint64_t*>(row), count);
    }
}

struct Item {
    bool explicit_form;
    GramTask gram;
    ExplicitTask outer;
};

// The lane sums at the end of each Gram tile cost about as much as this many more features.
constexpr double kFoldFeatures = 64;
// Measured on Zen 4: the explicit form, which packs its operands, takes this much longer for a FLOP than the Gram form.
constexpr double kExplicitCost = 1.3;

bool takes_explicit(const GhostNormArguments& arguments, int64_t rows) {
    if (arguments.form != kAuto) return arguments.form == kExplicit;
    const double inputs = static_cast<double>(arguments.x.columns), outputs = static_cast<double>(arguments.dy.columns);
    return (static_cast<double>(rows) + 1) * (inputs + outputs + kFoldFeatures) > 2 * inputs * outputs * kExplicitCost;
}

// Blocks of equal size up to one row: part `index` of `parts` of [0, count) begins here.
int64_t part(int64_t count, int64_t parts, int64_t index) { return count * index / parts; }

void add_items(const GhostNormArguments& arguments, const int64_t* rows, int64_t count, std::vector<Item>& items) {
    if (count == 0) return;
    Item item{};
    if (takes_explicit(arguments, count)) {
        item.explicit_form = true;
        const bool x_wide = arguments.x.columns >= arguments.dy.columns;
        const Matrix wide = x_wide ? arguments.x : arguments.dy, narrow = x_wide ? arguments.dy : arguments.x;
        const int64_t parts = (narrow.columns + kNarrowBlock - 1) / kNarrowBlock;
        for (int64_t p = 0; p < parts; ++p) {
            for (int64_t begin = 0; begin < wide.columns; begin += kWideBlock) {
                item.outer = {wide, narrow, rows, count, begin, std::min(wide.columns, begin + kWideBlock),
                              part(narrow.columns, parts, p), part(narrow.columns, parts, p + 1)};
                items.push_back(item);
            }
        }
        return;
    }
    const int64_t parts = (count + kGramRows - 1) / kGramRows;
    for (int64_t p = 0; p < parts; ++p) {
        const int64_t a = part(count, parts, p), a_end = part(count, parts, p + 1);
        for (int64_t q = 0; q <= p; ++q) {
            const int64_t b = part(count, parts, q), b_end = part(count, parts, q + 1);
            item.gram = {arguments.x, arguments.dy, rows + a, rows + b, static_cast<int>(a_end - a),
                         static_cast<int>(b_end - b), p == q};
            items.push_back(item);
        }
    }
}

const Kernels* kernels_of(int instruction_set) {
#ifdef FILLM_X86
    if (instruction_set == 1) return avx2_kernels();
    if (instruction_set == 2) return avx512_kernels();
#endif
    return instruction_set == 0 ? generic_kernels() : nullptr;
}

}  // namespace

void nonzero_rows(const void* data, int64_t stride, int64_t rows, int64_t columns, int itemsize, bool* flags,
                  int threads) {
    // About 256 KiB a piece: a zero row is read to its end, any other row only at its beginning.
    const int64_t piece = std::max<int64_t>(16, (int64_t(1) << 18) / std::max<int64_t>(1, columns * itemsize));
    parallel(rows, piece, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            flags[r] = any_nonzero(static_cast<const unsigned char*>(data) + r * stride * itemsize, columns, itemsize);
    });
}

void ghost_norm(const GhostNormArguments& arguments, const char* instruction_set) {
    const Kernels& kernels = kernels_of(instruction_set_index(instruction_set))[arguments.dtype];

    const int64_t total = arguments.offsets[arguments.samples];
    std::unique_ptr<bool[]> used(new bool[static_cast<size_t>(total) + 1]);
    nonzero_rows(arguments.dy.data, arguments.dy.stride, total, arguments.dy.columns, itemsize_of(arguments.dtype),
                 used.get(), arguments.threads);
    std::vector<int64_t> rows;
    rows.reserve(static_cast<size_t>(total));  // so that pointers into it stay good
    std::vector<Item> items;
    std::vector<size_t> first_item{0};
    for (int64_t sample = 0; sample < arguments.samples; ++sample) {
        const size_t begin = rows.size();
        for (int64_t r = arguments.offsets[sample]; r < arguments.offsets[sample + 1]; ++r)
            if (used[static_cast<size_t>(r)]) rows.push_back(r);
        add_items(arguments, rows.data() + begin, static_cast<int64_t>(rows.size() - begin), items);
        first_item.push_back(items.size());
    }

    std::vector<double> shares(items.size());
    parallel(static_cast<int64_t>(items.size()), 1, arguments.threads, [&](int64_t begin, int64_t) {
        const Item& item = items[static_cast<size_t>(begin)];
        void* memory = item_scratch(kernels.scratch_bytes);
        shares[static_cast<size_t>(begin)] =
            item.explicit_form ? kernels.explicit_form(item.outer, memory) : kernels.gram(item.gram, memory);
    });
    for (int64_t sample = 0; sample < arguments.samples; ++sample) {
        double sum = 0;
        for (size_t i = first_item[static_cast<size_t>(sample)]; i < first_item[static_cast<size_t>(sample) + 1]; ++i)
            sum += shares[i];
        arguments.norms[sample] = sum;
    }
}

}  // namespace fillm
