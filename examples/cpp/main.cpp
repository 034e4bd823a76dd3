// Squared norms of two samples' gradients of a linear layer, without forming them, beside the same by hand.
#include <cstdio>
#include <thread>
#include <vector>

#include <fillm/ghost_norm.h>

int main() {
    const int64_t inputs = 4, outputs = 3, offsets[] = {0, 2, 6};
    std::vector<float> x, dy;
    for (int i = 0; i < 6 * inputs; ++i) x.push_back(0.1f * static_cast<float>(i % 7) - 0.3f);
    for (int i = 0; i < 6 * outputs; ++i) dy.push_back(0.2f * static_cast<float>(i % 5) - 0.4f);

    double norms[2];
    fillm::GhostNormArguments arguments{};
    arguments.x = {x.data(), inputs, inputs};  // address, entries from row to row, columns
    arguments.dy = {dy.data(), outputs, outputs};
    arguments.offsets = offsets;
    arguments.samples = 2;
    arguments.norms = norms;
    arguments.dtype = fillm::kFloat32;
    arguments.form = fillm::kAuto;
    arguments.threads = static_cast<int>(std::thread::hardware_concurrency());
    fillm::ghost_norm(arguments, "");

    for (int sample = 0; sample < 2; ++sample) {
        double by_hand = 0;
        for (int o = 0; o < outputs; ++o) {
            for (int i = 0; i < inputs; ++i) {
                double entry = 0;
                for (int64_t t = offsets[sample]; t < offsets[sample + 1]; ++t)
                    entry += static_cast<double>(dy[static_cast<size_t>(t * outputs + o)]) * static_cast<double>(x[static_cast<size_t>(t * inputs + i)]);
                by_hand += entry * entry;
            }
        }
        std::printf("sample %d: %.6f, by hand %.6f\n", sample, norms[sample], by_hand);
        if (norms[sample] - by_hand > 1e-5 || by_hand - norms[sample] > 1e-5) return 1;
    }
    return 0;
}
