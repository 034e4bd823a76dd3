#include "../cpu/factored_sketch.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"

void fillm::bind_factored_sketch(py::module_& module) {
    using Side = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, std::vector<uint64_t>>;
    module.def(
        "factored_sketch",
        [](const Side& dy, const Side& x, uintptr_t offsets, int64_t samples, uint32_t kind, uintptr_t out, int dtype,
           int threads, const std::string& instruction_set) {
            const auto side = [](const Side& s) {
                return FactoredSide{{pointer<const void>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)},
                                    std::get<3>(s), std::get<4>(s), std::get<5>(s).data()};
            };
            fillm::factored_sketch({{side(dy), side(x)},
                                    pointer<const int64_t>(offsets),
                                    samples,
                                    static_cast<int64_t>(std::get<5>(dy).size()),
                                    kind,
                                    pointer<void>(out),
                                    static_cast<Dtype>(dtype),
                                    threads},
                                   instruction_set.c_str());
        },
        py::arg("dy"), py::arg("x"), py::arg("offsets"), py::arg("samples"), py::arg("kind"), py::arg("out"),
        py::arg("dtype"), py::arg("threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
