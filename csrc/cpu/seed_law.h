// The seed law (docs/seed-law.md) in C++ and CUDA C++: bins and signs of sketches, the same bits as
// fillm_kernels/seed_law.py.
//
// Unnamed namespace, for the reason given in vectors.h. Loops over these functions vectorise.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FILLM_ANYWHERE __host__ __device__
#else
#define FILLM_ANYWHERE
#endif

namespace fillm {
namespace {

enum Stream : uint32_t { kStart = 0, kSign = 1, kRadius = 2, kAngle = 3 };

struct Key {
    uint32_t first, second;
};

FILLM_ANYWHERE inline uint32_t mix(uint32_t word) {
    word = (word ^ (word >> 16)) * 0x7feb352du;
    word = (word ^ (word >> 15)) * 0x846ca68bu;
    return word ^ (word >> 16);
}

// The half of a key that depends on the seed alone.
FILLM_ANYWHERE inline Key seeded(uint64_t seed) {
    const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    return {mix(low ^ 0x243f6a88u) + high, mix(low ^ 0x85a308d3u) + high};
}

FILLM_ANYWHERE inline Key key_of(Key seeded, uint32_t kind, Stream stream, uint32_t chunk) {
    const uint32_t tag = kind | static_cast<uint32_t>(stream) << 4 | chunk << 8;
    return {mix(mix(seeded.first) ^ tag), mix(mix(seeded.second) ^ tag)};
}

FILLM_ANYWHERE inline Key key_of(uint64_t seed, uint32_t kind, Stream stream, uint32_t chunk) {
    return key_of(seeded(seed), kind, stream, chunk);
}

// The half of the hash that depends on the 64-bit index alone.
FILLM_ANYWHERE inline Key state_of(Key key, uint64_t index) {
    const uint32_t low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
    return {mix(mix(low ^ key.first) + high), mix(mix(low ^ key.second) + high)};
}

FILLM_ANYWHERE inline uint32_t cell(Key state, uint32_t column) { return mix(mix(column + state.first) ^ state.second); }

FILLM_ANYWHERE inline uint32_t below(uint32_t word, uint32_t limit) {
    return static_cast<uint32_t>(static_cast<uint64_t>(word) * limit >> 32);
}

}  // namespace
}  // namespace fillm
