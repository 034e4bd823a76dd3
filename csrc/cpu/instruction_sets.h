// Which instruction sets this build and this processor both have, and the choice among an op's kernels.
#pragma once

#include <string>

namespace fillm {

// Names, slowest first; returns how many.
int instruction_sets(const char* names[3]);

// Position of `wanted` in {generic, avx2, avx512}; "" means the fastest there is. Throws std::invalid_argument.
int instruction_set_index(const std::string& wanted);

}  // namespace fillm
