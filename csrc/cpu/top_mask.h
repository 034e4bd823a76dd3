// top_mask on the CPU: what the driver (top_mask.cpp) and the per-instruction-set kernels share.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace fillm {

constexpr int kDigitBits = 16;
constexpr int kDigits = 1 << kDigitBits;

// A run of scores of one tensor, `count` of them.
struct ScoreRun {
    const void* scores;
    int64_t count;
};

// Kernels of one instruction set for one element type. A score's key is its bits read as an unsigned integer whose order
// is that of the scores; -0 has the key of +0.
struct TopMaskKernels {
    // table[digit] += 1 for every score whose key begins with `prefix`; the digit lies `shift` bits above the key's end.
    // Returns whether one of the scores is a NaN.
    bool (*count)(const ScoreRun&, int shift, uint64_t prefix, uint32_t* table);
    int64_t (*equal)(const ScoreRun&, uint64_t key);
    // Sets the bits of keys above `key` and of the first `ties` equal ones, clears all others; whole bytes.
    void (*write)(const ScoreRun&, uint64_t key, int64_t ties, uint8_t* bits);
    void (*value)(uint64_t key, void* score);
    int key_bits;
};

const TopMaskKernels* generic_top_mask();  // kDtypes entries
#ifdef FILLM_X86
const TopMaskKernels* avx2_top_mask();
const TopMaskKernels* avx512_top_mask();
#endif

struct TopMaskArguments {
    std::vector<ScoreRun> scores;  // one run a tensor
    std::vector<uint8_t*> bits;    // [ceil(count / 8)] each, written whole
    int64_t budget;                // bits to set, at most the number of scores
    void* threshold;               // the budget-th largest score, written if budget > 0
    Dtype dtype;
    int threads;
};

// Returns the first tensor that holds a NaN (then nothing is written), or -1.
int64_t top_mask(const TopMaskArguments& arguments, const char* instruction_set);

}  // namespace fillm
