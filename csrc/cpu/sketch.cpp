// Driver of sketch: a vector is cut into pieces by sizes alone, every piece adds up in bins of its own, and the bins of
// the pieces are added in order. So the bits depend neither on the number of threads nor on the other vectors.
#include "sketch.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "factored_sketch.h"
#include "instruction_sets.h"
#include "parallel.h"

namespace fillm {
namespace {

// A piece is this many times `dim` long, so that writing and adding its bins is a few per cent of reading it.
constexpr int64_t kPieceDims = 64;
constexpr int64_t kBinsAtOnce = 4096;
// Runs shorter than this leave vectors along them half empty; with this many rows, the lanes are better given to rows.
constexpr int64_t kNarrow = 16, kNarrowDim = 4096, kRows = 16;

template <class T>
void add_pieces(const SketchArguments& arguments, int64_t pieces, const T* slots) {
    const int64_t dim = arguments.map.dim();
    const T scale = static_cast<T>(arguments.scale);
    T* out = static_cast<T*>(arguments.out);
    parallel(arguments.samples * dim, kBinsAtOnce, arguments.threads, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end;) {
            const int64_t sample = at / dim, bin = at - sample * dim, count = std::min(end - at, dim - bin);
            T* sums = out + at;
            std::fill(sums, sums + count, T(0));
            for (int64_t p = 0; p < pieces; ++p) {
                const T* slot = slots + (sample * pieces + p) * dim + bin;
                for (int64_t k = 0; k < count; ++k) sums[k] += slot[k];
            }
            for (int64_t k = 0; k < count; ++k) sums[k] *= scale;
            at += count;
        }
    });
}

}  // namespace

const SketchKernels& sketch_kernels(Dtype dtype, const char* instruction_set) {
    const int index = instruction_set_index(instruction_set);
#ifdef FILLM_X86
    if (index == 1) return sketch_avx2_kernels()[dtype];
    if (index == 2) return sketch_avx512_kernels()[dtype];
#endif
    return index == 0 ? sketch_generic_kernels()[dtype] : throw std::invalid_argument("no such kernels");
}

size_t sketch_scratch_bytes(const SketchMap& map) {
    // A widened block in float, sign words, starts.
    return static_cast<size_t>(map.width + map.dim() + map.chunks * kSigns) * sizeof(uint32_t);
}

void sketch(const SketchArguments& arguments, const char* instruction_set) {
    const SketchKernels& kernels = sketch_kernels(arguments.dtype, instruction_set);
    const SketchMap& map = arguments.map;
    const int64_t dim = map.dim(), group = kSigns * map.width;
    // Pieces begin where a word of sign bits does, at multiples of `length` counted from coordinate 0.
    const int64_t length = (kPieceDims * dim + group - 1) / group * group;
    if (map.ranges == 1 && map.width < kNarrow && dim <= kNarrowDim && arguments.samples >= kRows)
        return sketch_narrow(arguments, length, instruction_set);
    const int64_t first = arguments.offset / length, last = (arguments.offset + arguments.count + length - 1) / length;
    const int64_t pieces = arguments.count > 0 ? last - first : 0;
    const size_t item = arguments.dtype == kFloat64 ? 8 : 4;
    std::unique_ptr<unsigned char[]> memory(
        new unsigned char[static_cast<size_t>(arguments.samples * pieces * dim) * item + 64]);
    unsigned char* slots = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);

    parallel(arguments.samples * pieces, 1, arguments.threads, [&](int64_t index, int64_t) {
        const int64_t sample = index / pieces, p = first + index % pieces;
        const int64_t begin = std::max(p * length, arguments.offset);
        const int64_t end = std::min((p + 1) * length, arguments.offset + arguments.count);
        void* bins = slots + static_cast<size_t>(index * dim) * item;
        std::memset(bins, 0, static_cast<size_t>(dim) * item);
        const int64_t at = sample * arguments.stride + (begin - arguments.offset);
        kernels.piece({map, static_cast<const unsigned char*>(arguments.values) + at * itemsize_of(arguments.dtype),
                       begin, end - begin, bins},
                      scratch(sketch_scratch_bytes(map)));
    });
    if (arguments.dtype == kFloat64) add_pieces(arguments, pieces, reinterpret_cast<const double*>(slots));
    else add_pieces(arguments, pieces, reinterpret_cast<const float*>(slots));
}

void sketch_tile(const SketchMap& map, const SketchTile& tile, const void* values, void* bins, Dtype dtype,
                 const char* instruction_set) {
    const SketchKernels& kernels = sketch_kernels(dtype, instruction_set);
    const size_t room = static_cast<size_t>(plan_room(map, tile.rows * tile.columns));
    std::vector<SketchRun> runs(room);
    std::vector<uint32_t> flips(room);
    SketchPlan plan{runs.data(), flips.data(), 0};
    kernels.plan(map, tile, plan);
    kernels.add(plan, values, bins);
}

}  // namespace fillm
