#include "../cpu/masked_step.h"

#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings.h"

namespace {

// bits, starts, entries; rows, row_count, columns: addresses are 0 for the form that is not used.
using SelectedNumbers = std::array<int64_t, 6>;

fillm::Selected selected_of(const SelectedNumbers& numbers) {
    return {reinterpret_cast<const uint8_t*>(numbers[0]), reinterpret_cast<const int64_t*>(numbers[1]), numbers[2],
            reinterpret_cast<const int64_t*>(numbers[3]), numbers[4], numbers[5]};
}

fillm::Values values_of(uintptr_t data, int dtype) {
    return {reinterpret_cast<const void*>(data), static_cast<fillm::Dtype>(dtype)};
}

}  // namespace

void fillm::bind_masked_step(py::module_& module) {
    module.def(
        "masked_step",
        [](uintptr_t param, int dtype, uintptr_t grad, int grad_dtype, uintptr_t estimate, int estimate_dtype,
           uintptr_t first, uintptr_t second, const SelectedNumbers& selected, int rule,
           const std::array<double, 7>& scalars, int threads, const std::string& instruction_set) {
            const auto& s = scalars;
            fillm::MaskedStepArguments arguments{
                reinterpret_cast<void*>(param),
                static_cast<fillm::Dtype>(dtype),
                values_of(grad, grad_dtype),
                values_of(estimate, estimate_dtype),
                reinterpret_cast<void*>(first),
                reinterpret_cast<void*>(second),
                selected_of(selected),
                static_cast<fillm::Rule>(rule),
                {s[0], s[1], s[2], s[3], s[4], s[5], s[6]},
                threads,
            };
            fillm::masked_step(arguments, instruction_set.c_str());
        },
        py::arg("param"), py::arg("dtype"), py::arg("grad"), py::arg("grad_dtype"), py::arg("estimate"),
        py::arg("estimate_dtype"), py::arg("first"), py::arg("second"), py::arg("selected"), py::arg("rule"),
        py::arg("scalars"), py::arg("threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());

    module.def(
        "masked_squares",
        [](uintptr_t grad, int dtype, const SelectedNumbers& selected, int threads,
           const std::string& instruction_set) {
            return fillm::masked_squares(values_of(grad, dtype), selected_of(selected), threads,
                                         instruction_set.c_str());
        },
        py::arg("grad"), py::arg("dtype"), py::arg("selected"), py::arg("threads"), py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());
}
