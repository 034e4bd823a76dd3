#include "../cpu/sketch.h"

#include "../cpu/dense_sketch.h"

#include <string>

#include "bindings.h"

void fillm::bind_sketch(py::module_& module) {
    module.def(
        "sketch",
        [](uintptr_t values, int64_t stride, int64_t samples, int64_t count, int64_t offset, uintptr_t out,
           uint64_t seed, uint32_t kind, int64_t chunks, int64_t ranges, int64_t width, double scale, int dtype,
           int threads, const std::string& instruction_set) {
            fillm::SketchArguments arguments{
                {seed, kind, chunks, ranges, width},
                reinterpret_cast<const void*>(values),
                stride,
                samples,
                count,
                offset,
                reinterpret_cast<void*>(out),
                static_cast<fillm::Dtype>(dtype),
                scale,
                threads,
            };
            fillm::sketch(arguments, instruction_set.c_str());
        },
        py::arg("values"), py::arg("stride"), py::arg("samples"), py::arg("count"), py::arg("offset"), py::arg("out"),
        py::arg("seed"), py::arg("kind"), py::arg("chunks"), py::arg("ranges"), py::arg("width"), py::arg("scale"),
        py::arg("dtype"), py::arg("threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());

    module.def(
        "sketch_dense",
        [](uintptr_t values, int64_t stride, int64_t samples, int64_t count, int64_t offset, uintptr_t out,
           uint64_t seed, uint32_t kind, int64_t dim, int dtype, int threads, const std::string& instruction_set,
           uintptr_t row_offsets) {
            fillm::sketch_dense({{seed, kind, dim},
                                 fillm::pointer<const void>(values),
                                 stride,
                                 samples,
                                 count,
                                 offset,
                                 fillm::pointer<const int64_t>(row_offsets),
                                 fillm::pointer<void>(out),
                                 static_cast<fillm::Dtype>(dtype),
                                 threads},
                                instruction_set.c_str());
        },
        py::arg("values"), py::arg("stride"), py::arg("samples"), py::arg("count"), py::arg("offset"), py::arg("out"),
        py::arg("seed"), py::arg("kind"), py::arg("dim"), py::arg("dtype"), py::arg("threads"),
        py::arg("instruction_set"), py::arg("row_offsets") = 0, py::call_guard<py::gil_scoped_release>());

    module.def(
        "sketch_tile",
        [](uintptr_t values, int64_t stride, int64_t rows, int64_t columns, int64_t row, int64_t column,
           int64_t inputs, uintptr_t bins, uint64_t seed, uint32_t kind, int64_t chunks, int64_t ranges, int64_t width,
           int dtype, const std::string& instruction_set) {
            fillm::sketch_tile({seed, kind, chunks, ranges, width}, {stride, rows, columns, row, column, inputs},
                               fillm::pointer<const void>(values), fillm::pointer<void>(bins),
                               static_cast<fillm::Dtype>(dtype), instruction_set.c_str());
        },
        py::arg("values"), py::arg("stride"), py::arg("rows"), py::arg("columns"), py::arg("row"), py::arg("column"),
        py::arg("inputs"), py::arg("bins"), py::arg("seed"), py::arg("kind"), py::arg("chunks"), py::arg("ranges"),
        py::arg("width"), py::arg("dtype"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
