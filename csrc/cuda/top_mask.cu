// top_mask on CUDA devices: radix selection on digits of 16 bits, then the bits; whole numbers throughout.
//
// Scores become unsigned keys of the same order. A pass counts one digit of the keys whose higher digits are known; a
// single block finds the digit of the wanted key; the last read writes the bits. Reads: 2 of 16-bit scores, 3 of
// float32, 5 of float64. All tensors are taken in one launch, in pieces of 16384 scores.
//
// Why 16 bits fit (untimed): a table of 65536 counters of 16 bits is 128 KiB of shared memory, one thread block of 1024
// a multiprocessor. A counter that reaches 2^15 is emptied into the totals by the thread that made it so. Between two
// barriers a block counts at most 16384 scores, so no counter passes 2^15 + 16384. Scores of the next piece are loaded
// before those of this one are counted: 64 KiB of float32 in flight. Lanes with the same digit wait for each other; a
// warp whose scores all have the same one (zeros, mostly) adds once.
//
// Ties beyond the budget go to the lowest (tensor, flat index). The block that writes a piece needs the number of ties
// before it. Pieces are handed out in order, and a block publishes its own number before it asks for those of earlier
// ones, which are therefore known or about to be: no extra read, and nobody waits for a block that has not begun.
#include "top_mask.h"

#include <algorithm>

#include "launch.h"
#include "look_back.h"

namespace fillm {
namespace {

constexpr int kCountThreads = 1024;
constexpr int kWriteThreads = 512, kWriteWarps = kWriteThreads / kWarp, kLaneScores = kPieceScores / kWriteThreads;
constexpr int kDigitBits = 16;
constexpr uint32_t kHalfFull = 0x8000;
static_assert(kLaneScores == kWarp, "a lane writes one word of bits");
static_assert(kPieceScores <= kHalfFull, "what is counted between two barriers fits beside a counter below 2^15");

template <class Bits>
__device__ constexpr Bits sign_bit() {
    return static_cast<Bits>(Bits(1) << (sizeof(Bits) * 8 - 1));
}

// An unsigned number with the order of the scores; -0 becomes +0.
template <class Bits>
__device__ __forceinline__ Bits ordered(Bits bits) {
    bits = bits == sign_bit<Bits>() ? Bits(0) : bits;
    return static_cast<Bits>(bits & sign_bit<Bits>() ? ~bits : bits | sign_bit<Bits>());
}

// atomicAdd knows 64-bit numbers by one name only.
__device__ inline uint64_t add(uint64_t* where, uint64_t amount) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(where), static_cast<unsigned long long>(amount));
}

struct Counters {
    uint32_t pairs[kDigitValues / 2];
};

// Adds to the counter of a digit, at most kPieceScores between two barriers.
__device__ __forceinline__ void count(Counters& counters, uint64_t* totals, uint32_t digit, uint32_t amount) {
    const int shift = (digit & 1) * 16;
    uint32_t* pair = &counters.pairs[digit >> 1];
    const uint32_t before = atomicAdd(pair, amount << shift) >> shift & 0xffff;
    if (before < kHalfFull && before + amount >= kHalfFull) {
        atomicAdd(pair, 0u - (kHalfFull << shift));
        add(totals + digit, kHalfFull);
    }
}

// Scores between two barriers: a piece, or half a piece of float64, for lack of registers.
template <class Bits>
struct Turn {
    static constexpr int kTurns = sizeof(Bits) == 8 ? 2 : 1, kScores = kPieceScores / kTurns;  // of a piece; of a turn
    static constexpr int kAtOnce = kScores / kCountThreads;                                    // of a thread
    const Bits* scores = nullptr;
    int64_t left = 0;  // scores from here to the tensor's end; none if it is not above 0
};

// `tensor` moves on from that of an earlier turn.
template <class Bits>
__device__ __forceinline__ Turn<Bits> locate(const ScoreTensor* tensors, int64_t turn, int64_t& tensor) {
    constexpr int kTurns = Turn<Bits>::kTurns;
    while (tensors[tensor + 1].first_piece <= turn / kTurns) ++tensor;
    const int64_t begin = (turn - tensors[tensor].first_piece * kTurns) * Turn<Bits>::kScores;
    return {static_cast<const Bits*>(tensors[tensor].scores) + begin, tensors[tensor].size - begin};
}

// totals[digit] += keys that begin with the known digits. kFirst: none is known, and NaN is looked for.
template <class Bits, bool kFirst, int kShared>
__global__ void __launch_bounds__(kCountThreads, 1)
    count_digits(const ScoreTensor* __restrict__ tensors, int64_t pieces, int shift, Bits infinity,
                 Selection* selection, uint64_t* totals) {
    static_assert(kShared == sizeof(Counters), "all of it is counters");
    Counters& counters = block_memory<Counters>();
    const int thread = static_cast<int>(threadIdx.x);
    for (int pair = thread; pair < kDigitValues / 2; pair += kCountThreads) counters.pairs[pair] = 0;
    const Bits known = kFirst ? Bits(0) : static_cast<Bits>(selection->key);
    const int above = (shift + kDigitBits) % (sizeof(Bits) * 8);  // the first digit, with none above it, does not ask
    __syncthreads();

    constexpr int kAtOnce = Turn<Bits>::kAtOnce;
    const int64_t turns = pieces * Turn<Bits>::kTurns;
    int64_t turn = blockIdx.x, tensor = 0;
    Bits next[kAtOnce];
    Turn<Bits> ahead{};
    const auto load = [&] {
        ahead = locate<Bits>(tensors, turn, tensor);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int at = u * kCountThreads + thread;
            next[u] = at < ahead.left ? __ldg(ahead.scores + at) : Bits(0);
        }
    };
    if (turn < turns) load();
    while (turn < turns) {
        Bits keys[kAtOnce];
        const int64_t left = ahead.left, owner = tensor;
        bool nan = false;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            nan |= kFirst && static_cast<Bits>(next[u] & static_cast<Bits>(~sign_bit<Bits>())) > infinity;
            keys[u] = ordered(next[u]);
        }
        turn += gridDim.x;
        if (turn < turns) load();
        if (kFirst && nan) atomicMin(reinterpret_cast<long long*>(&selection->nan), static_cast<long long>(owner));

        bool same = left >= Turn<Bits>::kScores && (kFirst || static_cast<Bits>(keys[0] >> above) == known);
#pragma unroll
        for (int u = 1; u < kAtOnce; ++u)
            same &= static_cast<Bits>(keys[u] >> shift) == static_cast<Bits>(keys[0] >> shift);
        const uint32_t digit = static_cast<uint32_t>(keys[0] >> shift) & 0xffff;
        const uint32_t leader = __shfl_sync(kAllLanes, digit, 0);
        if (__all_sync(kAllLanes, same && digit == leader)) {
            if (thread % kWarp == 0) count(counters, totals, digit, kAtOnce * kWarp);
        } else {
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) {
                const bool mine = kFirst || static_cast<Bits>(keys[u] >> above) == known;
                if (mine && u * kCountThreads + thread < left)
                    count(counters, totals, static_cast<uint32_t>(keys[u] >> shift) & 0xffff, 1);
            }
        }
        __syncthreads();
    }
    for (int digit = thread; digit < kDigitValues; digit += kCountThreads) {
        const uint32_t found = counters.pairs[digit >> 1] >> (digit & 1) * 16 & 0xffff;
        if (found) add(totals + digit, found);
    }
}

// The digit that holds the remaining-th largest key, by one block; empties `totals` for the next pass.
template <int kShared>
__global__ void __launch_bounds__(kCountThreads, 1) descend(Selection* selection, uint64_t* totals) {
    static_assert(kShared == sizeof(int64_t) * kCountThreads, "a slot for every thread");
    constexpr int kOwn = kDigitValues / kCountThreads;
    int64_t* sums = block_memory<int64_t[kCountThreads]>();
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t wanted = selection->remaining;
    uint64_t* own = totals + kDigitValues - static_cast<int64_t>(thread + 1) * kOwn;  // thread 0 has the largest digits
    int64_t total = 0;
    for (int k = 0; k < kOwn; ++k) total += static_cast<int64_t>(own[k]);
    sums[thread] = total;
    __syncthreads();
    for (int distance = 1; distance < kCountThreads; distance *= 2) {
        const int64_t earlier = thread >= distance ? sums[thread - distance] : 0;
        __syncthreads();
        sums[thread] += earlier;
        __syncthreads();
    }
    int64_t above = sums[thread] - total;
    if (above < wanted && wanted <= above + total) {
        int k = kOwn - 1;
        for (; above + static_cast<int64_t>(own[k]) < wanted; --k) above += static_cast<int64_t>(own[k]);
        selection->remaining = wanted - above;
        selection->key = selection->key << kDigitBits | static_cast<uint64_t>(own + k - totals);
        selection->ties = static_cast<int64_t>(own[k]);
    }
    for (int k = 0; k < kOwn; ++k) own[k] = 0;
}

struct Writing {
    int64_t piece, tensor;
    uint64_t before;            // ties of earlier pieces
    uint32_t ties[kWriteWarps];  // of the piece's warps
};

// Ties before the lane's 32 scores, over all tensors. Every thread of the block takes part.
__device__ inline uint64_t ties_before_lane(Writing& shared, uint64_t* ties, uint32_t own) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    uint32_t upto = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const uint32_t earlier = __shfl_up_sync(kAllLanes, upto, distance);
        upto += lane >= distance ? earlier : 0;
    }
    if (lane == kWarp - 1) shared.ties[warp] = upto;
    __syncthreads();
    if (warp == 0) {
        uint64_t all = 0;
        for (int other = 0; other < kWriteWarps; ++other) all += shared.ties[other];
        if (lane == 0 && shared.piece > 0) publish(ties + shared.piece, kOwnTies | all);
        const uint64_t before = ties_before(ties, shared.piece);
        if (lane == 0) {
            publish(ties + shared.piece, kAllTies | (before + all));
            shared.before = before;
        }
    }
    __syncthreads();
    uint64_t before = shared.before + upto - own;
    for (int other = 0; other < warp; ++other) before += shared.ties[other];
    return before;
}

// Bits of keys above the wanted one and of the first `remaining` equal to it. A lane gathers the word of 32 scores.
template <class Bits, int kShared>
__global__ void __launch_bounds__(kWriteThreads, 2)
    write_bits(const ScoreTensor* __restrict__ tensors, int64_t count, Selection* selection, uint64_t* ties) {
    static_assert(kShared == sizeof(Writing), "all of it is one record");
    Writing& shared = block_memory<Writing>();
    const Bits wanted = static_cast<Bits>(selection->key);
    const uint64_t quota = static_cast<uint64_t>(selection->remaining);
    const bool surplus = selection->ties > selection->remaining;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    if (threadIdx.x == 0) {
        const int64_t piece = surplus ? static_cast<int64_t>(add(&selection->ticket, 1)) : blockIdx.x;
        int64_t low = 0, high = count;  // tensors[low].first_piece <= piece < tensors[high].first_piece
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (tensors[middle].first_piece <= piece ? low : high) = middle;
        }
        shared.piece = piece;
        shared.tensor = low;
    }
    __syncthreads();
    const ScoreTensor tensor = tensors[shared.tensor];
    const int64_t first = (shared.piece - tensor.first_piece) * kPieceScores + warp * kWarp * kWarp;
    const int64_t left = tensor.size - first;  // may be negative
    const Bits* scores = static_cast<const Bits*>(tensor.scores) + first;
    uint32_t chosen = 0, level = 0;
    for (int begin = 0; begin < kLaneScores; begin += 8) {
        Bits keys[8];
#pragma unroll
        for (int u = 0; u < 8; ++u) {
            const int at = (begin + u) * kWarp + lane;
            keys[u] = at < left ? __ldg(scores + at) : Bits(0);
        }
#pragma unroll
        for (int u = 0; u < 8; ++u) {
            const Bits key = ordered(keys[u]);
            const bool there = (begin + u) * kWarp + lane < left;
            const unsigned upwards = __ballot_sync(kAllLanes, there && key >= wanted);
            if (lane == begin + u) chosen = upwards;
            if (!surplus) continue;
            const unsigned equal = __ballot_sync(kAllLanes, there && key == wanted);
            if (lane == begin + u) level = equal;
        }
    }
    if (surplus) {
        const uint32_t own = static_cast<uint32_t>(__popc(level));
        const uint64_t before = ties_before_lane(shared, ties, own);
        uint64_t kept = before < quota ? quota - before : 0;
        for (; kept > 0 && level; --kept) level &= level - 1;  // strikes off the ties that keep their bits
        chosen &= ~level;
    }
    const int64_t begin = first + lane * kWarp;
    if (begin + kWarp <= tensor.size) {
        *reinterpret_cast<uint32_t*>(tensor.bits + begin / 8) = chosen;
    } else {
        for (int64_t at = begin; at < tensor.size; at += 8)
            tensor.bits[at / 8] = static_cast<uint8_t>(chosen >> (at - begin));
    }
}

template <class Bits>
void run(const CudaTopMask& job, Bits infinity, bool count_only, uintptr_t stream) {
    constexpr int kCounters = sizeof(Counters), kSums = sizeof(int64_t) * kCountThreads, kRecord = sizeof(Writing);
    const int64_t blocks = std::min<int64_t>(job.pieces, multiprocessors());
    for (int shift = static_cast<int>(sizeof(Bits)) * 8 - kDigitBits; shift >= 0; shift -= kDigitBits) {
        const bool first = shift + kDigitBits == static_cast<int>(sizeof(Bits)) * 8;
        auto kernel = count_digits<Bits, true, kCounters>;
        if constexpr (sizeof(Bits) > 2)  // 16 bits are one digit
            if (!first) kernel = count_digits<Bits, false, kCounters>;
        launch<kCounters>(kernel, blocks, kCountThreads, stream, job.tensors, job.pieces, shift, infinity,
                          job.selection, job.totals);
        if (count_only) return;
        launch<kSums>(descend<kSums>, 1, kCountThreads, stream, job.selection, job.totals);
    }
    launch<kRecord>(write_bits<Bits, kRecord>, job.pieces, kWriteThreads, stream, job.tensors, job.count, job.selection,
                    job.ties);
}

}  // namespace

void cuda_top_mask(const CudaTopMask& job, bool count_only, uintptr_t stream) {
    if (job.dtype == kFloat64) run<uint64_t>(job, 0x7ff0000000000000u, count_only, stream);
    else if (job.dtype == kBFloat16) run<uint16_t>(job, 0x7f80u, count_only, stream);
    else if (job.dtype == kFloat16) run<uint16_t>(job, 0x7c00u, count_only, stream);
    else run<uint32_t>(job, 0x7f800000u, count_only, stream);
}

}  // namespace fillm
