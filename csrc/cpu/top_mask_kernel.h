// The kernels of top_mask, compiled once per instruction set by the top_mask_<set>.cpp that includes this file.
#pragma once

#include "top_mask.h"
#include "vectors.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace fillm {
namespace {

// How a score lies in memory: its bits, and the bits of infinity, above which (without the sign) stand the NaNs.
template <class S>
struct Stored;
template <>
struct Stored<float> {
    using Bits = uint32_t;
    static constexpr Bits infinity = 0x7f800000u;
};
template <>
struct Stored<double> {
    using Bits = uint64_t;
    static constexpr Bits infinity = 0x7ff0000000000000u;
};
template <>
struct Stored<BFloat16> {
    using Bits = uint16_t;
    static constexpr Bits infinity = 0x7f80u;
};
template <>
struct Stored<Float16> {
    using Bits = uint16_t;
    static constexpr Bits infinity = 0x7c00u;
};

template <class Bits>
constexpr Bits kSign = static_cast<Bits>(Bits(1) << (sizeof(Bits) * 8 - 1));

template <class Bits>
inline Bits key_of(Bits bits) {
    bits = bits == kSign<Bits> ? Bits(0) : bits;
    return static_cast<Bits>(bits & kSign<Bits> ? ~bits : bits | kSign<Bits>);
}

constexpr int kKeys = 256;  // keys taken at a time, by loops that the compiler vectorises

template <class S>
bool count(const ScoreRun& run, int shift, uint64_t prefix, uint32_t* table) {
    using Bits = typename Stored<S>::Bits;
    constexpr int width = sizeof(Bits) * 8;
    const bool first = shift + kDigitBits == width;
    const Bits* scores = static_cast<const Bits*>(run.scores);
    Bits nan = 0;
    for (int64_t begin = 0; begin < run.count; begin += kKeys) {
        const int64_t ahead = run.count - begin;
        const int size = static_cast<int>(ahead < kKeys ? ahead : kKeys);
        Bits keys[kKeys];
        if (first) {
            for (int k = 0; k < size; ++k) {
                const Bits bits = scores[begin + k];
                nan = static_cast<Bits>(nan | (static_cast<Bits>(bits & ~kSign<Bits>) > Stored<S>::infinity));
                keys[k] = static_cast<Bits>(key_of(bits) >> shift);
            }
            for (int k = 0; k < size; ++k) ++table[keys[k]];
            continue;
        }
        // No shift by the whole width: `first` has gone its own way.
        const int above = (shift + kDigitBits) % width;
        const Bits wanted = static_cast<Bits>(prefix);
        Bits found = 0;
        for (int k = 0; k < size; ++k) {
            keys[k] = key_of(scores[begin + k]);
            found = static_cast<Bits>(found | (static_cast<Bits>(keys[k] >> above) == wanted));
        }
        if (!found) continue;
        for (int k = 0; k < size; ++k)
            if (static_cast<Bits>(keys[k] >> above) == wanted) ++table[(keys[k] >> shift) & (kDigits - 1)];
    }
    return nan != 0;
}

template <class S>
int64_t equal(const ScoreRun& run, uint64_t key) {
    using Bits = typename Stored<S>::Bits;
    const Bits* scores = static_cast<const Bits*>(run.scores);
    const Bits wanted = static_cast<Bits>(key);
    int64_t total = 0;
    for (int64_t begin = 0; begin < run.count; begin += kKeys) {
        const int64_t ahead = run.count - begin;
        const int size = static_cast<int>(ahead < kKeys ? ahead : kKeys);
        Bits same = 0;  // 16 bits are enough to count 256 keys
        for (int k = 0; k < size; ++k) same = static_cast<Bits>(same + (key_of(scores[begin + k]) == wanted));
        total += static_cast<int64_t>(same);
    }
    return total;
}

// Bit i of the result: whether flags[i] is 1 (it is 0 otherwise).
inline uint64_t pack(const uint8_t* flags) {
#if defined(__AVX512BW__)
    const __m512i bytes = _mm512_loadu_si512(flags);
    return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
    uint64_t word = 0;
    for (int half = 0; half < 2; ++half) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags + 32 * half));
        const uint32_t lanes = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(bytes, 7)));
        word |= static_cast<uint64_t>(lanes) << (32 * half);
    }
    return word;
#else
    uint64_t word = 0;
    for (int group = 0; group < 8; ++group) {
        uint64_t byte = 0;  // eight flags, gathered into the top byte by one product
        for (int k = 0; k < 8; ++k) byte |= static_cast<uint64_t>(flags[8 * group + k]) << (8 * k);
        word |= (byte * 0x0102040810204080u >> 56) << (8 * group);
    }
    return word;
#endif
}

// The lowest `count` bits that are set in `word`.
inline uint64_t lowest(uint64_t word, int64_t count) {
    uint64_t taken = 0;
    for (; count > 0; --count) {
        taken |= word & -word;
        word &= word - 1;
    }
    return taken;
}

template <class S>
void write(const ScoreRun& run, uint64_t key, int64_t ties, uint8_t* bits) {
    using Bits = typename Stored<S>::Bits;
    const Bits* scores = static_cast<const Bits*>(run.scores);
    const Bits wanted = static_cast<Bits>(key);
    for (int64_t begin = 0; begin < run.count; begin += 64) {
        const int64_t ahead = run.count - begin;
        const int size = static_cast<int>(ahead < 64 ? ahead : 64);
        uint8_t over[64] = {}, same[64] = {};
        auto compare = [&](int end) __attribute__((always_inline)) {
            for (int k = 0; k < end; ++k) {
                const Bits own = key_of(scores[begin + k]);
                over[k] = own > wanted;
                same[k] = own == wanted;
            }
        };
        if (size == 64) compare(64);
        else compare(size);
        uint64_t word = pack(over);
        if (ties > 0) {
            const uint64_t level = pack(same);
            const int64_t found = __builtin_popcountll(level);
            word |= found <= ties ? level : lowest(level, ties);
            ties -= found <= ties ? found : ties;
        }
        for (int byte = 0; byte < (size + 7) / 8; ++byte)  // byte by byte: the order is little whatever the processor's
            bits[begin / 8 + byte] = static_cast<uint8_t>(word >> (8 * byte));
    }
}

template <class S>
void value(uint64_t key, void* score) {
    using Bits = typename Stored<S>::Bits;
    const Bits own = static_cast<Bits>(key);
    const Bits bits = static_cast<Bits>(own & kSign<Bits> ? own & ~kSign<Bits> : ~own);
    std::memcpy(score, &bits, sizeof bits);
}

template <class S>
constexpr TopMaskKernels top_mask_for() {
    return {count<S>, equal<S>, write<S>, value<S>, static_cast<int>(sizeof(typename Stored<S>::Bits)) * 8};
}

constexpr TopMaskKernels kTopMask[kDtypes] = {top_mask_for<float>(), top_mask_for<double>(), top_mask_for<BFloat16>(),
                                              top_mask_for<Float16>()};

}  // namespace
}  // namespace fillm
