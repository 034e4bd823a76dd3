"""What the masked optimiser steps share: their checks, the clip factor, and the call into the extension."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import FLOATS, accumulation_dtype, as_tensor, check_memory
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.selection import Places, as_selection, check_selection, extension_numbers, packed, unpacked

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


class Stepped(NamedTuple):
    """What one call steps, as the registered ops take it: entry t of each list belongs to parameter t.

    Attributes:
        params, grads, firsts, seconds: parameters, gradients and the two state tensors, detached.
        masks, starts, sizes: the selections, as `packed` gives them.
    """

    params: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]
    masks: list[Tensor]
    starts: list[Tensor]
    sizes: list[int]


def as_stepped(param: Any, grad: Any, state: Any, mask: Any) -> tuple[Tensor | list[Tensor], Stepped]:
    """What a step is given, for one parameter or as lists for several, over the caller's memory.

    Returns:
        The parameters as the step returns them, one tensor or a list; and what the ops take.

    Raises:
        ShapeError: if lists are empty or differ in length, or a state is not two tensors.
    """
    many = isinstance(param, (list, tuple))
    params, grads, states, masks = (param, grad, state, mask) if many else ([param], [grad], [state], [mask])
    lengths = [len(each) for each in (params, grads, states, masks)]
    if not params or len(set(lengths)) > 1:
        raise ShapeError(f"param, grad, state and mask must be lists of one length, not empty; got {lengths}")
    for pair in states:
        if len(pair) != 2:
            raise ShapeError(f"state must be two tensors; got {len(pair)}")
    params = [as_tensor(each, "param", written=True) for each in params]
    firsts, seconds = (detached([pair[i] for pair in states], "state", written=True) for i in range(2))
    selections = [as_selection(each, own) for each, own in zip(masks, params, strict=True)]
    stepped = Stepped(detached(params, "param"), detached(grads, "grad"), firsts, seconds, *packed(selections))
    return params if many else params[0], stepped


def detached(values: Sequence[Any], name: str, *, written: bool = False) -> list[Tensor]:
    """Tensors over the memory of `values`, without their graphs."""
    return [as_tensor(value, name, written=written).detach() for value in values]


def check_steps(stepped: Stepped, estimates: Sequence[Tensor] = ()) -> list[Places]:
    """Check the arguments of one call; reads no values.

    Args:
        stepped: the tensors.
        estimates: one a parameter, or none at all.

    Returns:
        Every parameter's selection.

    Raises:
        ShapeError, DtypeError, DeviceError: with what clashes.
    """
    places = unpacked(stepped.masks, stepped.starts, stepped.sizes)
    if len(estimates) not in (0, len(places)):
        raise ShapeError(f"estimates must be one for each of {len(places)} parameters; got {len(estimates)}")
    values = zip(stepped.grads, estimates, strict=True) if estimates else zip(stepped.grads, strict=True)
    states = zip(stepped.firsts, stepped.seconds, strict=True)
    for param, *rest in zip(stepped.params, values, states, places, strict=True):
        check_step(param, *rest)
        if param.device != stepped.params[0].device:
            raise DeviceError("parameters of one call must lie on one device; make a call for each")
    return places


def check_apart(stepped: Stepped, estimates: Sequence[Tensor] = ()) -> None:
    """Check that what a parameter's step writes shares no memory with anything else of that step.

    Raises:
        ShapeError: naming the arguments.
    """
    for t, (param, first, second) in enumerate(zip(stepped.params, stepped.firsts, stepped.seconds, strict=True)):
        read = {"grad": stepped.grads[t], "estimate": estimates[t] if estimates else None, "the mask": stepped.masks[t]}
        check_memory({"param": param, "state[0]": first, "state[1]": second}, read)


def check_step(param: Tensor, values: Sequence[Tensor], state: Sequence[Tensor], places: Places) -> None:
    """Check what a parameter is stepped with; reads no values.

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
