"""Kernels for per-sample gradients that are never formed.

Ragged convention of every op: `x [N, I]` and `dy [N, O]` hold the samples one after another without padding, `offsets
[B + 1]` says where each begins. `G_b = dy_b^T x_b`, `[O, I]`, is sample b's gradient of an `nn.Linear.weight`.

One file per op holds formula and source, reference, custom op, fake kernel and dispatch. The C++ of an op lies in
`csrc/cpu/<op>.cpp`; a Triton kernel belongs in `fillm_kernels/triton/<op>.py`, CUDA C++ in `csrc/cuda/<op>.cu`, and
both join the op's line in the dispatch table. Neither exists yet: on CUDA the ops run on torch's operators.
"""

from fillm_kernels.dispatch import backends
from fillm_kernels.errors import BackendError, DeviceError, DtypeError, KernelError, ShapeError
from fillm_kernels.ghost_dot import ghost_dot
from fillm_kernels.ghost_norm import ghost_norm
from fillm_kernels.sample_moments import Moments, sample_moments
from fillm_kernels.weighted_outer import weighted_outer_

__all__ = [
    "BackendError",
    "DeviceError",
    "DtypeError",
    "KernelError",
    "Moments",
    "ShapeError",
    "backends",
    "ghost_dot",
    "ghost_norm",
    "sample_moments",
    "weighted_outer_",
]
