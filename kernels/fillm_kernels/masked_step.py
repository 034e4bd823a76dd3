"""What the masked optimiser steps share: their checks, the clip factor, and the call into the extension."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import FLOATS, accumulation_dtype, as_tensor
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.selection import Places, check_selection, extension_numbers

RULES = ("adamw", "sophia")  # as Rule in csrc/cpu/masked_step.h


def as_factor(clip: Tensor | float, param: Tensor) -> Tensor:
    """A clip factor as the ops take it: scalar, float64, where the parameter lies."""
    if isinstance(clip, Tensor):
        if clip.numel() != 1 or not clip.is_floating_point():
            raise ShapeError(f"clip and lr must be one floating number; got {clip.dtype}, {list(clip.shape)}")
        return clip.detach().to(device=param.device, dtype=torch.float64).reshape(())
    return torch.full((), clip, dtype=torch.float64, device=param.device)


def as_rate(lr: Tensor | float) -> Tensor:
    """A learning rate as the ops take it: scalar, float64, on the CPU, so that reading it waits for no device."""
    return as_factor(lr, torch.empty(0))


def check_rates(betas: Sequence[float], eps: float, weight_decay: float) -> None:
    """Refuse decay rates outside [0, 1), and an `eps` or a decay that is negative or NaN, with a `ShapeError`."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ShapeError(f"betas must lie in [0, 1); got {tuple(betas)}")
    if not (eps >= 0 and weight_decay >= 0):
        raise ShapeError(f"eps and weight_decay must not be negative; got {eps} and {weight_decay}")


def value_of(rate: Tensor) -> float:
    """The learning rate of a step.

    Raises:
        ShapeError: if it is negative or NaN.
    """
    lr = float(rate)
    if not lr >= 0:
        raise ShapeError(f"lr must not be negative; got {lr}")
    return lr


def as_state(state: Sequence[Tensor | Any]) -> tuple[Tensor, Tensor]:
    """The two state tensors of a step, over the caller's memory."""
    if len(state) != 2:
        raise ShapeError(f"state must be two tensors; got {len(state)}")
    first, second = (as_tensor(tensor, "state", written=True).detach() for tensor in state)
    return first, second


def check_step(param: Tensor, values: Sequence[Tensor], state: Sequence[Tensor], places: Places) -> None:
    """Check the arguments of a masked step; reads no values.

    Args:
        param: any shape, contiguous.
        values: gradient and estimate, shape of `param`, its dtype or the one it accumulates in.
        state: two tensors with one entry a selected weight, contiguous.
        places: the selection.

    Raises:
        ShapeError, DtypeError, DeviceError: with what clashes.
    """
    wide = accumulation_dtype(param.dtype)
    if param.dtype not in FLOATS:
        raise DtypeError(f"param must be float32, float64, bfloat16 or float16; got {param.dtype}")
    if not param.is_contiguous():
        raise ShapeError("param must be contiguous: it is changed in place and its mask counts flat indices")
    for tensor in values:
        if tensor.shape != param.shape:
            raise ShapeError(f"grad and estimate must be {list(param.shape)} as param; got {list(tensor.shape)}")
        if tensor.dtype not in (param.dtype, wide):
            raise DtypeError(f"grad and estimate must be {param.dtype} or {wide}; got {tensor.dtype}")
    for tensor in state:
        if tensor.numel() != places.sizes[2] or not tensor.is_contiguous():
            raise ShapeError(f"state must be contiguous, one entry for each of {places.sizes[2]} selected weights")
        if tensor.dtype != wide:
            raise DtypeError(f"state must be {wide}; got {tensor.dtype}")
    for tensor in (*values, *state):
        if tensor.device != param.device:
            raise DeviceError(f"gradient and state must lie where the parameter does, {param.device}")
    check_selection(param, places)


def native_step(
    rule: str,
    param: Tensor,
    grad: Tensor,
    estimate: Tensor | None,
    state: tuple[Tensor, Tensor],
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
    instruction_set: str,
) -> None:
    """One masked step in C++ (csrc/cpu/masked_step.cpp); scalars are decay, beta1, beta2, step size, scale and eps."""
    decay, *others = scalars
    grad = grad.contiguous()
    estimate = None if estimate is None else estimate.contiguous()
    native.extension.masked_step(
        param=param.data_ptr(),
        dtype=_code(param),
        grad=grad.data_ptr(),
        grad_dtype=_code(grad),
        estimate=0 if estimate is None else estimate.data_ptr(),
        estimate_dtype=_code(grad if estimate is None else estimate),
        first=state[0].data_ptr(),
        second=state[1].data_ptr(),
        selected=extension_numbers(places),
        rule=RULES.index(rule),
        scalars=[decay, float(clip), *others],
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )


def _code(tensor: Tensor) -> int:
    return native.DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")]
