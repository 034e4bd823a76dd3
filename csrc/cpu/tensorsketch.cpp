// Driver of TensorSketch: samples' gradients are formed, some rows at a time, and folded into bins; and count sketches of
// single rows, for who goes through their transforms.
//
// A sample is one thread's and a row's sketch its own, so bits depend neither on threads nor on neighbours.
#include <algorithm>
#include <vector>

#include "factored_sketch.h"
#include "parallel.h"
#include "seed_law.h"

namespace fillm {
namespace {

constexpr uint32_t kTensorSketch = 5;  // position in KINDS
constexpr int64_t kStrip = 32;         // rows of a gradient that are formed at a time

// Bin and sign of every coordinate of a side, the seed law's 9.
std::vector<Placement> placements_of(uint64_t seed, int side, int64_t width, int64_t dim) {
    const Key start = key_of(seed, kTensorSketch, kStart, static_cast<uint32_t>(side));
    const Key sign = key_of(seed, kTensorSketch, kSign, static_cast<uint32_t>(side));
    std::vector<Placement> places(static_cast<size_t>(width));
    uint32_t word = 0;
    for (int64_t q = 0; q < width; ++q) {
        if (q % kSigns == 0) word = cell(state_of(sign, static_cast<uint64_t>(q / kSigns)), 0);
        places[q] = {below(cell(state_of(start, static_cast<uint64_t>(q)), 0), static_cast<uint32_t>(dim)),
                     word << (31 - q % kSigns) & 0x80000000u};
    }
    return places;
}

// One map, as FoldTask takes it.
template <class T>
struct Fold {
    std::vector<Placement> outputs;
    std::vector<uint32_t> input_bins;
    std::vector<T> input_signs;

    Fold(const TensorSketchArguments& arguments, uint64_t seed)
        : outputs(placements_of(seed, 0, arguments.sides[0].columns, arguments.dim)) {
        const std::vector<Placement> inputs = placements_of(seed, 1, arguments.sides[1].columns, arguments.dim);
        for (const Placement& place : inputs) {
            input_bins.push_back(place.bin);
            input_signs.push_back(place.sign ? T(-1) : T(1));
        }
        for (const Placement& place : inputs) input_signs.push_back(place.sign ? T(1) : T(-1));
    }
};

template <class T>
void sketch_samples(const TensorSketchArguments& arguments, const FactoredKernels& kernels) {
    const Matrix &dy = arguments.sides[0], &x = arguments.sides[1];
    const int64_t dim = arguments.dim, maps = arguments.maps;
    std::vector<Fold<T>> folds;
    for (int64_t m = 0; m < maps; ++m) folds.emplace_back(arguments, arguments.seeds[m]);
    parallel(arguments.samples, 1, arguments.threads, [&](int64_t sample, int64_t) {
        const int64_t begin = arguments.offsets[sample], tokens = arguments.offsets[sample + 1] - begin;
        T* bins = static_cast<T*>(item_scratch(static_cast<size_t>(2 * maps * dim + kStrip * x.columns) * sizeof(T)));
        T* formed = bins + 2 * maps * dim;
        std::fill(bins, formed, T(0));
        for (int64_t row = 0; row < (tokens ? dy.columns : 0); row += kStrip) {
            const int64_t rows = std::min(kStrip, dy.columns - row);
            std::fill(formed, formed + rows * x.columns, T(0));
            kernels.multiply({static_cast<const T*>(dy.data) + begin * dy.stride + row,
                              static_cast<const T*>(x.data) + begin * x.stride, dy.stride, x.stride, tokens, rows,
                              x.columns, formed});
            for (int64_t m = 0; m < maps; ++m)
                kernels.fold({formed, x.columns, rows, x.columns, folds[m].outputs.data() + row,
                              folds[m].input_bins.data(), folds[m].input_signs.data(), bins + 2 * m * dim});
        }
        T* out = static_cast<T*>(arguments.out) + sample * maps * dim;
        for (int64_t m = 0; m < maps; ++m, out += dim, bins += 2 * dim)
            for (int64_t k = 0; k < dim; ++k) out[k] = bins[k] + bins[dim + k];
    });
}

}  // namespace

void tensorsketch(const TensorSketchArguments& arguments, const char* instruction_set) {
    const FactoredKernels& kernels = factored_kernels(arguments.computes, instruction_set);
    if (arguments.computes == kFloat64) sketch_samples<double>(arguments, kernels);
    else sketch_samples<float>(arguments, kernels);
}

void count_sketch(const CountSketchArguments& arguments, const char* instruction_set) {
    const FactoredKernels& kernels = factored_kernels(arguments.dtype, instruction_set);
    const int64_t padded = padded_side(arguments.dim), lanes = kernels.lanes;
    const int64_t item = arguments.dtype == kFloat64 ? 8 : 4;
    const Matrix& matrix = arguments.rows;
    const std::vector<Placement> placements =
        placements_of(arguments.seed, arguments.side, matrix.columns, arguments.dim);
    parallel(arguments.count, lanes, arguments.threads, [&](int64_t begin, int64_t end) {
        void* bins = item_scratch(static_cast<size_t>(padded * lanes * item));
        const int64_t at = begin * matrix.stride * itemsize_of(arguments.dtype);
        kernels.project({static_cast<const unsigned char*>(matrix.data) + at, matrix.stride, matrix.columns,
                         end - begin, placements.data(), 1, padded, 1.0, bins,
                         static_cast<unsigned char*>(arguments.out) + begin * padded * item});
    });
}

}  // namespace fillm
