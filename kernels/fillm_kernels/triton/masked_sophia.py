"""`masked_sophia_` in Triton: one pass over parameter, gradient, estimate, state and bits, in float32.

float64 parameters go to torch's operators: the numbers that a Triton kernel is launched with are float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels import masked_sophia
from fillm_kernels.selection import BLOCK, Places
from fillm_kernels.triton.device import device_of
from fillm_kernels.triton.masked_step import WARPS, is_empty, place_arguments, places_of


@triton.jit
def _step(
    param,  # [entries]
    grad,  # [entries]
    estimate,  # [entries], or anything if not FRESH
    exp_avg,  # [count], float32
    hessian,  # [count], float32
    clip,  # [1], float64
    bits,
    starts,
    rows,
    entries,
    columns,
    decay,
    fresh1,
    fresh2,
    step_size,
    gamma,
    eps,
    FRESH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if is_empty(starts, ROWS):
        return
    at, chosen, state = places_of(bits, starts, rows, entries, columns, ROWS, BLOCK)
    w = tl.load(param + at, mask=chosen, other=0).to(tl.float32)
    g = tl.load(grad + at, mask=chosen, other=0).to(tl.float32) * tl.load(clip).to(tl.float32)
    m = tl.load(exp_avg + state, mask=chosen, other=0)
    h = tl.load(hessian + state, mask=chosen, other=0)
    m += fresh1 * (g - m)
    if FRESH:
        h += fresh2 * (tl.load(estimate + at, mask=chosen, other=0).to(tl.float32) - h)
        tl.store(hessian + state, h, mask=chosen)
    curvature = gamma * h
    # Comparisons let a NaN through, where a maximum or a minimum would drop it.
    update = m / tl.where(curvature < eps, eps, curvature)
    update = tl.where(update > 1, 1.0, update)
    update = tl.where(update < -1, -1.0, update)
    tl.store(exp_avg + state, m, mask=chosen)
    tl.store(param + at, (w * decay - step_size * update).to(param.dtype.element_ty), mask=chosen)


def launch(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    estimate: Tensor | None,
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
) -> None:
    """One step; the arguments are checked."""
    if param.dtype == torch.float64:
        masked_sophia.on_torch(param, grad, first, second, estimate, places, clip, scalars)
        return
    decay, beta1, beta2, step_size, gamma, eps = scalars
    numbers = (decay, 1 - beta1, 1 - beta2, step_size, gamma, eps)
    programs, arguments = place_arguments(places, param.device)
    grad = grad.contiguous()
    if programs:
        tensors = (param, grad, grad if estimate is None else estimate.contiguous(), first, second, clip)
        flags = (estimate is not None, places.rows is not None)
        with device_of(param):
            _step[(programs,)](*tensors, *arguments, *numbers, *flags, BLOCK, num_warps=WARPS, enable_fp_fusion=True)
