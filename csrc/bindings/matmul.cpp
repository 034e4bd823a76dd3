#include "../cpu/matmul.h"

#include <string>

#include "bindings.h"

void fillm::bind_matmul(py::module_& module) {
    module.def(
        "matmul_into",
        [](int64_t m, int64_t n, int64_t k, const Address& a, const Address& b, const Address& out, uintptr_t k_rows,
           uintptr_t k_scale, uintptr_t bias, double alpha, bool accumulate, int threads,
           const std::string& instruction_set) {
            MatmulArguments arguments{};
            arguments.m = m, arguments.n = n, arguments.k = k;
            arguments.a = operand(a), arguments.b = operand(b);
            arguments.k_rows = pointer<const int64_t>(k_rows), arguments.k_scale = pointer<const double>(k_scale);
            arguments.bias = pointer<const void>(bias), arguments.alpha = alpha;
            arguments.out = pointer<void>(std::get<0>(out));
            arguments.out_row_stride = std::get<1>(out), arguments.out_column_stride = std::get<2>(out);
            arguments.computes = static_cast<Dtype>(std::get<3>(out));
            arguments.accumulate = accumulate, arguments.threads = threads;
            matmul(arguments, instruction_set.c_str());
        },
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a"), py::arg("b"), py::arg("out"), py::arg("k_rows"),
        py::arg("k_scale"), py::arg("bias"), py::arg("alpha"), py::arg("accumulate"), py::arg("threads"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());

    module.def(
        "matmul_row_dots",
        [](int64_t m, int64_t n, int64_t k, const Address& a, const Address& b, const Address& other, uintptr_t m_rows,
           uintptr_t dots, int computes, int threads, const std::string& instruction_set) {
            MatmulArguments arguments{};
            arguments.m = m, arguments.n = n, arguments.k = k;
            arguments.a = operand(a), arguments.b = operand(b), arguments.other = operand(other);
            arguments.m_rows = pointer<const int64_t>(m_rows), arguments.dots = pointer<double>(dots);
            arguments.computes = static_cast<Dtype>(computes), arguments.threads = threads;
            matmul(arguments, instruction_set.c_str());
        },
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a"), py::arg("b"), py::arg("other"), py::arg("m_rows"),
        py::arg("dots"), py::arg("computes"), py::arg("threads"), py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());
}
