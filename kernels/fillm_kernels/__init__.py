"""Kernels for per-sample gradients that are never formed.

Ragged convention of every op: `x [N, I]` and `dy [N, O]` hold the samples one after another without padding, `offsets
[B + 1]` says where each begins. `G_b = dy_b^T x_b`, `[O, I]`, is sample b's gradient of an `nn.Linear.weight`.

One file per op holds formula and source, reference, custom op, fake kernel and dispatch. The C++ of an op lies in
`csrc/cpu/<op>.cpp`; a Triton kernel in `fillm_kernels/triton/<op>.py`, CUDA C++ would lie in `csrc/cuda/<op>.cu`, and
both join the op's line in the dispatch table. An op without either runs on torch's operators on CUDA.
"""

from fillm_kernels.dispatch import backends
from fillm_kernels.errors import BackendError, DeviceError, DtypeError, KernelError, ShapeError
from fillm_kernels.factored_sketch import factored_sketch
from fillm_kernels.ghost_dot import ghost_dot
from fillm_kernels.ghost_norm import ghost_norm
from fillm_kernels.sketch import sketch
from fillm_kernels.weighted_outer import weighted_outer_

__all__ = [
    "BackendError",
    "DeviceError",
    "DtypeError",
    "KernelError",
    "ShapeError",
    "backends",
    "factored_sketch",
    "ghost_dot",
    "ghost_norm",
    "sketch",
    "weighted_outer_",
]
