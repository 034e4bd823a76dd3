"""Kernels for per-sample gradients that are never formed.

Ragged convention of the ops on layers: `x [N, I]` and `dy [N, O]` hold the samples one after another without padding,
`offsets [B + 1]` says where each begins. `G_b = dy_b^T x_b`, `[O, I]`, is sample b's gradient of an `nn.Linear.weight`.
Masks hold one bit a weight, as `top_mask` writes them.

One file per op holds formula and source, reference, custom op, fake kernel and dispatch. The C++ of an op lies in
`csrc/cpu/<op>.cpp`, its Triton kernel in `fillm_kernels/triton/<op>.py`, its CUDA C++, if any, in `csrc/cuda/<op>.cu`;
all join the op's line in the dispatch table.
"""

from fillm_kernels.dispatch import backends
from fillm_kernels.errors import BackendError, DeviceError, DtypeError, KernelError, NotANumberError, ShapeError
from fillm_kernels.factored_sketch import factored_sketch
from fillm_kernels.ghost_dot import ghost_dot
from fillm_kernels.ghost_gram import ghost_gram
from fillm_kernels.ghost_norm import ghost_norm
from fillm_kernels.masked_adamw import masked_adamw_
from fillm_kernels.masked_norm import masked_norm
from fillm_kernels.masked_sophia import masked_sophia_
from fillm_kernels.outer_sketch import outer_sketch
from fillm_kernels.sample_moments import Moments, sample_moments
from fillm_kernels.selection import Selection, select_bits, select_rows
from fillm_kernels.sides import side_rows, side_sketch, tensorsketch_side
from fillm_kernels.sketch import sketch
from fillm_kernels.soir_sweep import SoirSweep, soir_sweep
from fillm_kernels.top_mask import TopMask, top_mask
from fillm_kernels.weighted_outer import weighted_outer_

__all__ = [
    "BackendError",
    "DeviceError",
    "DtypeError",
    "KernelError",
    "Moments",
    "NotANumberError",
    "Selection",
    "ShapeError",
    "SoirSweep",
    "TopMask",
    "backends",
    "factored_sketch",
    "ghost_dot",
    "ghost_gram",
    "ghost_norm",
    "masked_adamw_",
    "masked_norm",
    "masked_sophia_",
    "outer_sketch",
    "sample_moments",
    "select_bits",
    "select_rows",
    "side_rows",
    "side_sketch",
    "sketch",
    "soir_sweep",
    "tensorsketch_side",
    "top_mask",
    "weighted_outer_",
]
