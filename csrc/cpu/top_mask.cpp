// Driver of top_mask: the budget-th largest key digit by digit, then the bits.
//
// Every pass over the scores counts 16 bits of the keys among those whose higher bits are known already; the last read
// writes the bits. Counters are whole numbers and pieces are cut by sizes alone, so nothing depends on the threads.
#include "top_mask.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>

#include "instruction_sets.h"
#include "parallel.h"

namespace fillm {
namespace {

constexpr int64_t kPiece = 1 << 16;  // scores; a multiple of 64, so that pieces share no byte of bits
constexpr int64_t kSpan = 64;        // pieces counted before a table is added to the totals

struct Piece {
    ScoreRun run;
    int64_t tensor;
    uint8_t* bits;
};

const TopMaskKernels& kernels_of(int instruction_set, Dtype dtype) {
#ifdef FILLM_X86
    if (instruction_set == 1) return avx2_top_mask()[dtype];
    if (instruction_set == 2) return avx512_top_mask()[dtype];
#endif
    (void)instruction_set;
    return generic_top_mask()[dtype];
}

std::vector<Piece> cut(const TopMaskArguments& arguments) {
    std::vector<Piece> pieces;
    const int64_t itemsize = itemsize_of(arguments.dtype);
    for (size_t t = 0; t < arguments.scores.size(); ++t) {
        const ScoreRun& whole = arguments.scores[t];
        for (int64_t begin = 0; begin < whole.count; begin += kPiece) {
            const auto* from = static_cast<const unsigned char*>(whole.scores) + begin * itemsize;
            pieces.push_back({{from, std::min(kPiece, whole.count - begin)}, static_cast<int64_t>(t),
                              arguments.bits[t] + begin / 8});
        }
    }
    return pieces;
}

// One pass: totals[digit] of the keys that begin with `prefix`. Returns the first tensor with a NaN, or -1.
int64_t count_digits(const std::vector<Piece>& pieces, const TopMaskKernels& kernels, int shift, uint64_t prefix,
                     int threads, std::vector<int64_t>& totals) {
    std::fill(totals.begin(), totals.end(), 0);
    std::mutex adding;
    int64_t nan_tensor = -1;
    parallel(static_cast<int64_t>(pieces.size()), kSpan, threads, [&](int64_t begin, int64_t end) {
        constexpr size_t bytes = sizeof(uint32_t) * kDigits;
        auto* table = static_cast<uint32_t*>(scratch(bytes));
        std::memset(table, 0, bytes);
        int64_t nan = -1;
        for (int64_t p = begin; p < end; ++p) {
            const Piece& piece = pieces[static_cast<size_t>(p)];
            if (kernels.count(piece.run, shift, prefix, table) && nan < 0) nan = piece.tensor;
        }
        const std::lock_guard<std::mutex> lock(adding);
        for (size_t digit = 0; digit < kDigits; ++digit) totals[digit] += table[digit];
        if (nan >= 0 && (nan_tensor < 0 || nan < nan_tensor)) nan_tensor = nan;
    });
    return nan_tensor;
}

// The bits, in one read: a piece needs the number of ties before it, which its predecessor makes known once it has
// counted its own. Pieces are handed out in order, so whoever waits waits for a piece that a thread is working on.
void write_bits(const std::vector<Piece>& pieces, const TopMaskKernels& kernels, uint64_t key, int64_t ties,
                int threads) {
    const size_t count = pieces.size();
    std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[count + 1]);
    for (size_t p = 1; p <= count; ++p) left[p].store(-1, std::memory_order_relaxed);
    left[0].store(ties, std::memory_order_release);
    parallel(static_cast<int64_t>(count), 1, threads, [&](int64_t begin, int64_t) {
        const auto p = static_cast<size_t>(begin);
        const int64_t own = kernels.equal(pieces[p].run, key);
        int64_t available;
        while ((available = left[p].load(std::memory_order_acquire)) < 0) std::this_thread::yield();
        left[p + 1].store(available - std::min(available, own), std::memory_order_release);
        kernels.write(pieces[p].run, key, std::min(available, own), pieces[p].bits);
    });
}

}  // namespace

int64_t top_mask(const TopMaskArguments& arguments, const char* instruction_set) {
    const TopMaskKernels& kernels = kernels_of(instruction_set_index(instruction_set), arguments.dtype);
    const std::vector<Piece> pieces = cut(arguments);
    std::vector<int64_t> totals(kDigits);
    int64_t remaining = arguments.budget, ties = 0;
    uint64_t key = 0;
    for (int shift = kernels.key_bits - kDigitBits; shift >= 0; shift -= kDigitBits) {
        const int64_t nan = count_digits(pieces, kernels, shift, key, arguments.threads, totals);
        if (nan >= 0) return nan;
        if (remaining == 0) break;  // nothing to select: the scores were read for NaN alone
        size_t digit = kDigits - 1;
        for (; totals[digit] < remaining; --digit) remaining -= totals[digit];
        key = key << kDigitBits | digit;
        ties = totals[digit];
    }
    if (arguments.budget == 0) {
        for (size_t t = 0; t < arguments.bits.size(); ++t)
            std::fill_n(arguments.bits[t], (arguments.scores[t].count + 7) / 8, uint8_t{0});
        return -1;
    }
    kernels.value(key, arguments.threshold);
    if (ties > remaining) {
        write_bits(pieces, kernels, key, remaining, arguments.threads);
    } else {  // every tie is taken; no key is 0, that of a NaN, so the one below exists
        parallel(static_cast<int64_t>(pieces.size()), 1, arguments.threads, [&](int64_t begin, int64_t) {
            const Piece& piece = pieces[static_cast<size_t>(begin)];
            kernels.write(piece.run, key - 1, 0, piece.bits);
        });
    }
    return -1;
}

}  // namespace fillm
