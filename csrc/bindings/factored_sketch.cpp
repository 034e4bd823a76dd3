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

    using Rows = std::tuple<uintptr_t, int64_t, int64_t>;  // address, stride, columns
    const auto matrix = [](const Rows& rows) {
        return Matrix{pointer<const void>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)};
    };
    module.def(
        "tensorsketch",
        [matrix](const Rows& dy, const Rows& x, uintptr_t offsets, int64_t samples, int64_t dim,
                 const std::vector<uint64_t>& seeds, uintptr_t out, int dtype, int threads,
                 const std::string& instruction_set) {
            fillm::tensorsketch({{matrix(dy), matrix(x)},
                                 pointer<const int64_t>(offsets),
                                 samples,
                                 dim,
                                 seeds.data(),
                                 static_cast<int64_t>(seeds.size()),
                                 pointer<void>(out),
                                 static_cast<Dtype>(dtype),
                                 threads},
                                instruction_set.c_str());
        },
        py::arg("dy"), py::arg("x"), py::arg("offsets"), py::arg("samples"), py::arg("dim"), py::arg("seeds"),
        py::arg("out"), py::arg("dtype"), py::arg("threads"), py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());

    module.def(
        "count_sketch",
        [matrix](const Rows& rows, int64_t count, int64_t dim, uint64_t seed, int side, uintptr_t out, int dtype,
                 int threads, const std::string& instruction_set) {
            fillm::count_sketch({matrix(rows), count, dim, seed, side, pointer<void>(out), static_cast<Dtype>(dtype),
                                 threads},
                                instruction_set.c_str());
        },
        py::arg("rows"), py::arg("count"), py::arg("dim"), py::arg("seed"), py::arg("side"), py::arg("out"),
        py::arg("dtype"), py::arg("threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
