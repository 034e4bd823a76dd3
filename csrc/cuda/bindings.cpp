// fillm_kernels._CUDA: a module of its own, since a machine without a driver must be able to import the rest.
//
// Raw addresses and sizes in, nothing of torch linked; shapes, dtypes and devices are checked by fillm_kernels/<op>.py.
// The tests build it for the CPU, with FILLM_CUDA_HOST, and then it also sets the machine that runs the kernels there.
#include <pybind11/pybind11.h>

#include "sketch.h"
#include "top_mask.h"

#ifdef FILLM_CUDA_HOST
#include "host/faults.h"
#endif

namespace py = pybind11;

namespace fillm {

void use_cuda_device(int device);

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

CudaSketch job_of(uint64_t seed, uint32_t kind, int64_t chunks, int64_t ranges, int64_t width, int64_t samples,
                  int64_t count, int64_t stride, int64_t step, int64_t offset) {
    return {seed, kind, chunks, ranges, width, samples, count, stride, step, offset};
}

}  // namespace
}  // namespace fillm

PYBIND11_MODULE(FILLM_MODULE, module) {
    using namespace fillm;
    module.doc() = "CUDA part of fillm_kernels; call it through the ops of the package.";
    module.attr("PIECE_SCORES") = kPieceScores;
    module.attr("DIGIT_VALUES") = kDigitValues;

    py::class_<CudaSketch>(module, "Sketch")
        .def(py::init(&job_of), py::kw_only(), py::arg("seed"), py::arg("kind"), py::arg("chunks"), py::arg("ranges"),
             py::arg("width"), py::arg("samples"), py::arg("count"), py::arg("stride"), py::arg("step"),
             py::arg("offset"))
        .def("parts", &cuda_sketch_parts)
        .def(
            "run",
            [](const CudaSketch& job, int dtype, uintptr_t values, uintptr_t parts, uintptr_t out, double scale,
               int device, uintptr_t stream) {
                use_cuda_device(device);
                cuda_sketch(job, static_cast<Dtype>(dtype), pointer<const void>(values), pointer<void>(parts),
                            pointer<void>(out), scale, stream);
            },
            py::kw_only(), py::arg("dtype"), py::arg("values"), py::arg("parts"), py::arg("out"), py::arg("scale"),
            py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());

    module.def(
        "top_mask",
        [](uintptr_t tensors, int64_t count, int64_t pieces, uintptr_t selection, uintptr_t totals, uintptr_t ties,
           int dtype, bool count_only, int device, uintptr_t stream) {
            use_cuda_device(device);
            cuda_top_mask({pointer<const ScoreTensor>(tensors), count, pieces, pointer<Selection>(selection),
                           pointer<uint64_t>(totals), pointer<uint64_t>(ties), static_cast<Dtype>(dtype)},
                          count_only, stream);
        },
        py::kw_only(), py::arg("tensors"), py::arg("count"), py::arg("pieces"), py::arg("selection"), py::arg("totals"),
        py::arg("ties"), py::arg("dtype"), py::arg("count_only"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());

#ifdef FILLM_CUDA_HOST
    module.def(
        "set_machine",
        [](int multiprocessors, int resident, uint64_t seed) {
            host::machine.settings = {multiprocessors, resident, seed};
        },
        py::kw_only(), py::arg("multiprocessors"), py::arg("resident"), py::arg("seed"));
    module.def("run_reversed", &host::run_reversed);
    module.def("run_waiting", &host::run_waiting);
#endif
}
