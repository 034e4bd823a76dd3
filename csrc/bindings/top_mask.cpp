#include "../cpu/top_mask.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"

void fillm::bind_top_mask(py::module_& module) {
    module.def(
        "top_mask",
        [](const std::vector<uintptr_t>& scores, const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& bits,
           int64_t budget, uintptr_t threshold, int dtype, int threads, const std::string& instruction_set) {
            fillm::TopMaskArguments arguments{{}, {}, budget, reinterpret_cast<void*>(threshold),
                                              static_cast<fillm::Dtype>(dtype), threads};
            for (size_t t = 0; t < scores.size(); ++t) {
                arguments.scores.push_back({reinterpret_cast<const void*>(scores[t]), sizes[t]});
                arguments.bits.push_back(reinterpret_cast<uint8_t*>(bits[t]));
            }
            return fillm::top_mask(arguments, instruction_set.c_str());
        },
        py::arg("scores"), py::arg("sizes"), py::arg("bits"), py::arg("budget"), py::arg("threshold"), py::arg("dtype"),
        py::arg("threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
