// Driver of masked steps: blocks of selected weights, gathered, stepped and put back, one pass over everything.
//
// A block without a set bit is not looked at, neither its parameters nor its gradient. Weights do not depend on each
// other, and norms are added up block by block, so the bits depend on nothing but the instruction set.
#include "masked_step.h"

#include <algorithm>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace fillm {
namespace {

constexpr int64_t kBlocksAtATime = 16;

const MaskedStepKernels* kernels_of(int instruction_set) {
#ifdef FILLM_X86
    if (instruction_set == 1) return avx2_masked_step();
    if (instruction_set == 2) return avx512_masked_step();
#endif
    (void)instruction_set;
    return generic_masked_step();
}

// Up to kMaskBlock weights next to each other, of which `count` are selected.
struct Block {
    int64_t begin;          // flat index of the first
    int64_t state;          // place of the first selected one in the state
    int count;
    const uint16_t* at;     // where they are, from `begin` on; null if all in a row
};

int positions(const uint8_t* bits, int entries, uint16_t* at) {
    int count = 0;
    for (int first = 0; first < entries; first += 64) {
        const int bytes = std::min(8, (entries - first + 7) / 8);
        uint64_t word = 0;
        for (int byte = 0; byte < bytes; ++byte) word |= static_cast<uint64_t>(bits[first / 8 + byte]) << (8 * byte);
        for (; word; word &= word - 1) at[count++] = static_cast<uint16_t>(first + __builtin_ctzll(word));
    }
    return count;
}

int64_t blocks_of(const Selected& selected) {
    const int64_t entries = selected.bits ? selected.entries : selected.columns;
    return (selected.bits ? 1 : selected.row_count) * ((entries + kMaskBlock - 1) / kMaskBlock);
}

Block block_of(const Selected& selected, int64_t index, uint16_t* at) {
    if (!selected.bits) {
        const int64_t a_row = (selected.columns + kMaskBlock - 1) / kMaskBlock;
        const int64_t row = index / a_row, column = index % a_row * kMaskBlock;
        return {selected.rows[row] * selected.columns + column, row * selected.columns + column,
                static_cast<int>(std::min<int64_t>(kMaskBlock, selected.columns - column)), nullptr};
    }
    const int64_t begin = index * kMaskBlock, state = selected.starts[index];
    const int entries = static_cast<int>(std::min<int64_t>(kMaskBlock, selected.entries - begin));
    const int count = static_cast<int>(selected.starts[index + 1] - state);
    if (count == 0 || count == entries) return {begin, state, count, nullptr};
    positions(selected.bits + begin / 8, entries, at);
    return {begin, state, count, at};
}

const void* element(const void* data, Dtype dtype, int64_t index) {
    return static_cast<const unsigned char*>(data) + index * itemsize_of(dtype);
}

// A block's values, dense; room for doubles serves floats too.
struct Workspace {
    uint16_t at[kMaskBlock];
    alignas(64) double param[kMaskBlock];
    alignas(64) double grad[kMaskBlock];
    alignas(64) double estimate[kMaskBlock];
};

}  // namespace

void masked_step(const MaskedStepArguments& arguments, const char* instruction_set) {
    const MaskedStepKernels* by_dtype = kernels_of(instruction_set_index(instruction_set));
    const MaskedStepKernels& kernels = by_dtype[arguments.dtype];
    const Dtype state_dtype = arguments.dtype == kFloat64 ? kFloat64 : kFloat32;
    parallel(blocks_of(arguments.selected), kBlocksAtATime, arguments.threads, [&](int64_t begin, int64_t end) {
        auto& own = *static_cast<Workspace*>(scratch(sizeof(Workspace)));
        auto gather = [&](const Values& values, const Block& block, void* to) {
            const void* from = element(values.data, values.dtype, block.begin);
            by_dtype[values.dtype].gather(from, block.at, block.count, to);
        };
        for (int64_t index = begin; index < end; ++index) {
            const Block block = block_of(arguments.selected, index, own.at);
            if (block.count == 0) continue;
            gather({arguments.param, arguments.dtype}, block, own.param);
            gather(arguments.grad, block, own.grad);
            void* first = const_cast<void*>(element(arguments.first, state_dtype, block.state));
            void* second = const_cast<void*>(element(arguments.second, state_dtype, block.state));
            if (arguments.rule == kAdamw) {
                kernels.adamw(own.param, own.grad, first, second, block.count, arguments.scalars);
            } else {
                if (arguments.estimate.data) gather(arguments.estimate, block, own.estimate);
                kernels.sophia(own.param, own.grad, first, second, arguments.estimate.data ? own.estimate : nullptr,
                               block.count, arguments.scalars);
            }
            void* param = const_cast<void*>(element(arguments.param, arguments.dtype, block.begin));
            kernels.scatter(own.param, block.at, block.count, param);
        }
    });
}

double masked_squares(const Values& grad, const Selected& selected, int threads, const char* instruction_set) {
    const MaskedStepKernels& kernels = kernels_of(instruction_set_index(instruction_set))[grad.dtype];
    const int64_t blocks = blocks_of(selected);
    std::vector<double> shares(static_cast<size_t>((blocks + kBlocksAtATime - 1) / kBlocksAtATime));
    parallel(blocks, kBlocksAtATime, threads, [&](int64_t begin, int64_t end) {
        auto& own = *static_cast<Workspace*>(scratch(sizeof(Workspace)));
        double sum = 0;
        for (int64_t index = begin; index < end; ++index) {
            const Block block = block_of(selected, index, own.at);
            if (block.count == 0) continue;
            kernels.gather(element(grad.data, grad.dtype, block.begin), block.at, block.count, own.grad);
            sum += kernels.squares(own.grad, block.count);
        }
        shares[static_cast<size_t>(begin / kBlocksAtATime)] = sum;
    });
    double total = 0;
    for (double share : shares) total += share;
    return total;
}

}  // namespace fillm
