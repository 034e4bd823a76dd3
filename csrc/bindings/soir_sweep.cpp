#include "../cpu/soir_sweep.h"

#include <string>

#include "bindings.h"

void fillm::bind_soir_sweep(py::module_& module) {
    module.def(
        "soir_sweep",
        [](uintptr_t s, uintptr_t v, uintptr_t norms, uintptr_t numel, double damping, int64_t tensors, int64_t rows,
           int64_t k, uintptr_t dots, uintptr_t weighted, uintptr_t pieces, int dtype, int threads,
           const std::string& instruction_set) {
            fillm::SoirSweepArguments arguments{
                reinterpret_cast<const void*>(s),
                reinterpret_cast<const void*>(v),
                reinterpret_cast<const double*>(norms),
                reinterpret_cast<const double*>(numel),
                damping,
                tensors,
                rows,
                k,
                reinterpret_cast<void*>(dots),
                reinterpret_cast<void*>(weighted),
                reinterpret_cast<double*>(pieces),
                static_cast<fillm::Dtype>(dtype),
                threads,
            };
            fillm::soir_sweep(arguments, instruction_set.c_str());
        },
        py::arg("s"), py::arg("v"), py::arg("norms"), py::arg("numel"), py::arg("damping"), py::arg("tensors"),
        py::arg("rows"), py::arg("k"), py::arg("dots"), py::arg("weighted"), py::arg("pieces"), py::arg("dtype"),
        py::arg("threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
