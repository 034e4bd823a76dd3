#include "../cpu/sample_moments.h"

#include <string>

#include "bindings.h"

void fillm::bind_sample_moments(py::module_& module) {
    module.def(
        "sample_moments",
        [](const Address& x, const Address& dy, int64_t inputs, int64_t outputs, uintptr_t rows, uintptr_t offsets,
           int64_t samples, const Address& v, const Address& second, const Address& absolute, double alpha,
           uintptr_t norms, uintptr_t dots, uintptr_t row_norms, uintptr_t sketches, uint64_t seed, uint32_t kind,
           int64_t chunks, int64_t ranges, int64_t width, double scale, int computes, int threads,
           const std::string& instruction_set) {
            MomentsArguments arguments{};
            arguments.x = operand(x), arguments.dy = operand(dy);
            arguments.inputs = inputs, arguments.outputs = outputs;
            arguments.rows = pointer<const int64_t>(rows), arguments.offsets = pointer<const int64_t>(offsets);
            arguments.samples = samples, arguments.alpha = alpha;
            arguments.v = operand(v), arguments.second = operand(second), arguments.absolute = operand(absolute);
            arguments.norms = pointer<double>(norms), arguments.dots = pointer<double>(dots);
            arguments.row_norms = pointer<double>(row_norms);
            arguments.map = {seed, kind, chunks, ranges, width}, arguments.sketch_scale = scale;
            arguments.sketches = pointer<void>(sketches);
            arguments.computes = static_cast<Dtype>(computes), arguments.threads = threads;
            sample_moments(arguments, instruction_set.c_str());
        },
        py::arg("x"), py::arg("dy"), py::arg("inputs"), py::arg("outputs"), py::arg("rows"), py::arg("offsets"),
        py::arg("samples"), py::arg("v"), py::arg("second"), py::arg("absolute"), py::arg("alpha"), py::arg("norms"),
        py::arg("dots"), py::arg("row_norms"), py::arg("sketches"), py::arg("seed"), py::arg("kind"), py::arg("chunks"),
        py::arg("ranges"), py::arg("width"), py::arg("scale"), py::arg("computes"), py::arg("threads"),
        py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());
}
