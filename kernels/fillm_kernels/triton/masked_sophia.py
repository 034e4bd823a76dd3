"""`masked_sophia_` in Triton: one pass over parameter, gradient, estimate, state and bits, in float32.

float64 parameters go to torch's operators: the numbers that a Triton kernel is launched with are float32.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels import masked_sophia
from fillm_kernels.selection import Places
from fillm_kernels.triton.configurations import POINTERS, CompileCase, launch_kernel, name_of
from fillm_kernels.triton.masked_step import (
    STEP,
    is_empty,
    place_arguments,
    place_types,
    places_of,
    step_case,
    value_types,
)


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
    tensors = (param, grad, grad if estimate is None else estimate.contiguous(), first, second, clip)
    flags = {"FRESH": estimate is not None, "ROWS": places.rows is not None}
    launch_kernel(_step, programs, STEP, *tensors, *arguments, *numbers, **flags)


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """A step on bits with an estimate, for the check at first use: divisors 2 (eps), 2 and 4, some updates clipped."""
    param, grad, first, second, places, clip = step_case(dtype, device, (0.0, 4.0, 12.0))
    return param, grad, first, second, grad.square(), places, clip, [0.5, 0.5, 0.5, 1.0, 0.5, 2.0]


def compile_cases() -> Iterator[CompileCase]:
    """Bits and rows, with an estimate and without, for every pair of types; most sizes are no multiples of 16."""
    numbers = dict.fromkeys(("decay", "fresh1", "fresh2", "step_size", "gamma", "eps"), "fp32")
    for (dtype, grad_dtype), rows, fresh in product(value_types(), (False, True), (False, True)):
        types = {"param": POINTERS[dtype], "grad": POINTERS[grad_dtype], "estimate": POINTERS[grad_dtype]}
        types |= {"exp_avg": "*fp32", "hessian": "*fp32", "clip": "*fp64"}
        places, constants = place_types(rows)
        form = f"{'rows' if rows else 'bits'}{' estimate' if fresh else ''}"
        beside = "" if grad_dtype == dtype else " beside float32"
        name = f"masked_sophia_ {form}{beside} {name_of(dtype)}"
        constants = {**constants, "FRESH": fresh, "ROWS": rows}
        yield CompileCase(name, _step, STEP, {**types, **places, **numbers}, constants, aligned=False)
