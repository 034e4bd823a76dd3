// One function per op, each in bindings/<op>.cpp; raw addresses and sizes in, nothing of torch linked.
#pragma once

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fillm {

void bind_ghost_norm(py::module_& module);
void bind_sketch(py::module_& module);

}  // namespace fillm
