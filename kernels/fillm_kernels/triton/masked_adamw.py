"""`masked_adamw_` in Triton: one pass over parameter, gradient, state and bits, in float32.

float64 parameters go to torch's operators: the numbers that a Triton kernel is launched with are float32.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels import masked_adamw
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
    tensors = (param, grad.contiguous(), first, second, clip)
    launch_kernel(_step, programs, STEP, *tensors, *arguments, *numbers, ROWS=places.rows is not None)


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """A step on bits, for the check at first use: roots of 1, 9 and 49, with eps divisors of 2, 4 and 8."""
    return *step_case(dtype, device, (1.0, 17.0, 97.0)), [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]


def compile_cases() -> Iterator[CompileCase]:
    """Bits and rows, for every pair of element types; most sizes are no multiples of 16."""
    numbers = dict.fromkeys(("decay", "fresh1", "beta2", "fresh2", "step_size", "scale", "eps"), "fp32")
    for (dtype, grad_dtype), rows in product(value_types(), (False, True)):
        types = {"param": POINTERS[dtype], "grad": POINTERS[grad_dtype]}
        types |= {"exp_avg": "*fp32", "exp_avg_sq": "*fp32", "clip": "*fp64"}
        places, constants = place_types(rows)
        beside = "" if grad_dtype == dtype else " beside float32"
        name = f"masked_adamw_ {'rows' if rows else 'bits'}{beside} {name_of(dtype)}"
        types = {**types, **places, **numbers}
        yield CompileCase(name, _step, STEP, types, {**constants, "ROWS": rows}, aligned=False)
