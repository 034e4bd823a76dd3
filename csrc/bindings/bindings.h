// One function per op, each in bindings/<op>.cpp; raw addresses and sizes in, nothing of torch linked.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "../cpu/matmul.h"

namespace py = pybind11;

namespace fillm {

using Address = std::tuple<uintptr_t, int64_t, int64_t, int>;  // address, row stride, column stride, element type

inline Operand operand(const Address& a) {
    return {reinterpret_cast<const void*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a),
            static_cast<Dtype>(std::get<3>(a))};
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_ghost_norm(py::module_& module);
void bind_matmul(py::module_& module);
void bind_sample_moments(py::module_& module);
void bind_top_mask(py::module_& module);
void bind_masked_step(py::module_& module);
void bind_soir_sweep(py::module_& module);
void bind_sketch(py::module_& module);
void bind_factored_sketch(py::module_& module);

}  // namespace fillm
