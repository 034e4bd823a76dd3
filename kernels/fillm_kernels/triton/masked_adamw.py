"""`masked_adamw_` in Triton: one pass over parameter, gradient, state and bits, in float32.

float64 parameters go to torch's operators: the numbers that a Triton kernel is launched with are float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels import masked_adamw
from fillm_kernels.selection import BLOCK, Places
from fillm_kernels.triton.device import device_of
from fillm_kernels.triton.masked_step import WARPS, is_empty, place_arguments, places_of


@triton.jit
def _step(
    param,  # [entries]
    grad,  # [entries]
    exp_avg,  # [count], float32
    exp_avg_sq,  # [count], float32
    clip,  # [1], float64
    bits,
    starts,
    rows,
    entries,
    columns,
    decay,
    fresh1,
    beta2,
    fresh2,
    step_size,
    scale,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if is_empty(starts, ROWS):
        return
    at, chosen, state = places_of(bits, starts, rows, entries, columns, ROWS, BLOCK)
    w = tl.load(param + at, mask=chosen, other=0).to(tl.float32)
    g = tl.load(grad + at, mask=chosen, other=0).to(tl.float32) * tl.load(clip).to(tl.float32)
    m = tl.load(exp_avg + state, mask=chosen, other=0)
    v = tl.load(exp_avg_sq + state, mask=chosen, other=0)
    m += fresh1 * (g - m)
    v = beta2 * v + fresh2 * g * g
    w = w * decay - step_size * (m / (tl.sqrt(v) * scale + eps))
    tl.store(exp_avg + state, m, mask=chosen)
    tl.store(exp_avg_sq + state, v, mask=chosen)
    tl.store(param + at, w.to(param.dtype.element_ty), mask=chosen)


def launch(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
) -> None:
    """One step; the arguments are checked."""
    if param.dtype == torch.float64:
        masked_adamw.on_torch(param, grad, first, second, places, clip, scalars)
        return
    decay, beta1, beta2, step_size, scale, eps = scalars
    numbers = (decay, 1 - beta1, beta2, 1 - beta2, step_size, scale, eps)
    programs, arguments = place_arguments(places, param.device)
    if programs:
        tensors = (param, grad.contiguous(), first, second, clip)
        with device_of(param):
            _step[(programs,)](
                *tensors, *arguments, *numbers, places.rows is not None, BLOCK, num_warps=WARPS, enable_fp_fusion=True
            )
