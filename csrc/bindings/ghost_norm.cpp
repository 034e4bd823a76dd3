#include "../cpu/ghost_norm.h"

#include <string>

#include "bindings.h"

void fillm::bind_ghost_norm(py::module_& module) {
    module.def(
        "nonzero_rows",
        [](uintptr_t data, int64_t stride, int64_t rows, int64_t columns, int itemsize, uintptr_t flags, int threads) {
            fillm::nonzero_rows(reinterpret_cast<const void*>(data), stride, rows, columns, itemsize,
                                reinterpret_cast<bool*>(flags), threads);
        },
        py::arg("data"), py::arg("stride"), py::arg("rows"), py::arg("columns"), py::arg("itemsize"), py::arg("flags"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());

    module.def(
        "ghost_norm",
        [](uintptr_t x, int64_t x_stride, int64_t inputs, uintptr_t dy, int64_t dy_stride, int64_t outputs,
           uintptr_t offsets, int64_t samples, uintptr_t norms, int dtype, int form, int threads,
           const std::string& instruction_set) {
            fillm::GhostNormArguments arguments{
                {reinterpret_cast<const void*>(x), x_stride, inputs},
                {reinterpret_cast<const void*>(dy), dy_stride, outputs},
                reinterpret_cast<const int64_t*>(offsets),
                samples,
                reinterpret_cast<double*>(norms),
                static_cast<fillm::Dtype>(dtype),
                static_cast<fillm::Form>(form),
                threads,
            };
            fillm::ghost_norm(arguments, instruction_set.c_str());
        },
        py::arg("x"), py::arg("x_stride"), py::arg("inputs"), py::arg("dy"), py::arg("dy_stride"), py::arg("outputs"),
        py::arg("offsets"), py::arg("samples"), py::arg("norms"), py::arg("dtype"), py::arg("form"), py::arg("threads"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
