// Which instruction sets this build and this processor both have, and the choice among an op's kernels.
#pragma once

#include <string>

namespace fillm {

// Names, slowest first; returns how many.
int instruction_sets(const char* names[3]);

// Position of `wanted` in {generic, avx2, avx512}; "" means the fastest there is. Throws std::invalid_argument.
int instruction_set_index(const std::string& wanted);

// Whether this is a processor on which MKL keeps to half of the vector width.
bool on_amd();

}  // namespace fillm
