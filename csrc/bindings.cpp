// fillm_kernels._C: raw addresses and sizes in, nothing of torch linked, so one build serves every torch version.
// Shapes, dtypes, devices and offsets are checked by the caller, fillm_kernels/<op>.py.
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/instruction_sets.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled part of fillm_kernels; call it through the ops of the package.";
    module.def("instruction_sets", [] {
        const char* names[3];
        const int count = fillm::instruction_sets(names);
        return std::vector<std::string>(names, names + count);
    });
    module.def("on_amd", &fillm::on_amd);
    fillm::bind_ghost_norm(module);
    fillm::bind_matmul(module);
    fillm::bind_sample_moments(module);
    fillm::bind_top_mask(module);
    fillm::bind_masked_step(module);
    fillm::bind_soir_sweep(module);
    fillm::bind_sketch(module);
    fillm::bind_factored_sketch(module);
}
