"""`masked_adamw_`: one AdamW step on the weights in a mask, and on nothing else.

    m <- m + (1 - b1)(g - m)        v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)      for every weight of the mask

Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2, with the schedule multiplier in lr, as torch.optim.AdamW has it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fillm_kernels.arguments import as_integer
from fillm_kernels.dispatch import Backend, register, select_each, triton_backend
from fillm_kernels.errors import ShapeError
from fillm_kernels.masked_step import (
    Stepped,
    as_factor,
    as_rate,
    as_stepped,
    check_apart,
    check_rates,
    check_steps,
    native_step,
    value_of,
)
from fillm_kernels.selection import Places, Selection, chosen_indices


def masked_adamw_(
    param: Tensor | Sequence[Tensor] | Any,
    grad: Tensor | Sequence[Tensor] | Any,
    state: tuple[Tensor | Any, Tensor | Any] | Sequence[tuple[Tensor | Any, Tensor | Any]],
    mask: Selection | Tensor | Sequence[Selection | Tensor] | Any,
    *,
    step: int,
    lr: Tensor | float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    clip: Tensor | float = 1.0,
) -> Tensor | list[Tensor]:
    """Take one AdamW step on the masked weights of a parameter, or of several together, in place.

    Weights outside the mask keep their bits: neither step, nor momentum, nor decay reaches them. Arithmetic is float32
    (float64 for float64 parameters); bfloat16 and float16 parameters are widened and rounded back to the nearest, ties
    to even, so that a change under half a unit in the last place is lost.

    Lists of parameters, gradients, states and masks, on one device, are stepped one after the other in one call of the
    registered op, whose passage through torch takes longer than a small step. An error leaves all of them as they were.

    Args:
        param: the parameter, any shape, contiguous, float32 | bfloat16 | float16 | float64; changed.
        grad: its gradient, same shape, same dtype or float32; any strides (a strided one is copied).
        state: (exp_avg, exp_avg_sq), float32 (float64 for float64 parameters), one entry a selected weight in the order
            of flat indices, as `Selection.new_state` makes them; changed.
        mask: a `Selection`, bits [ceil(P / 8)] uint8 as `top_mask` gives them, or rows [R] int64. Bits and rows are
            turned into a selection at every call; make the selection once where steps repeat.
        step: number of this step, from 1.
        lr: learning rate, schedule included, a number or a scalar tensor (on the CPU, to spare a synchronisation);
            torch.compile takes a number for a constant. This and what follows mean what they mean in torch.optim.AdamW.
        betas: decay rates of the two averages.
        eps: added to the root of the second one.
        weight_decay: decoupled, of masked weights only.
        clip: factor of the gradient, a number or a scalar tensor (which spares a CUDA device a synchronisation).

    Returns:
        `param` as a tensor, or a list of them.

    Raises:
        ShapeError: if sizes do not fit, `param` or state is not contiguous, `step` is below 1, or a rate is negative.
        DtypeError, DeviceError: if dtypes or devices do not go together.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    step = as_integer(step, "step")
    if step < 1:
        raise ShapeError(f"step counts from 1; got {step}")
    check_rates(betas, eps, weight_decay)
    result, stepped = as_stepped(param, grad, state, mask)
    _op(*stepped, as_factor(clip, stepped.params[0]), as_rate(lr), step, [weight_decay, *betas, eps])
    return result


def _reference(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
) -> None:
    """The definition in float64, rounded once; the oracle of the tests."""
    decay, beta1, beta2, step_size, scale, eps = scalars
    for place, at in chosen_indices(places):
        state = slice(place, place + at.shape[0])
        g = grad.flatten()[at].double() * clip
        m = beta1 * first.view(-1)[state].double() + (1 - beta1) * g
        v = beta2 * second.view(-1)[state].double() + (1 - beta2) * g.square()
        w = decay * param.view(-1)[at].double() - step_size * m / (v.sqrt() * scale + eps)
        first.view(-1)[state], second.view(-1)[state] = m.to(first.dtype), v.to(second.dtype)
        param.view(-1)[at] = w.to(param.dtype)


def on_torch(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
) -> None:
    """Torch's operators on gathered pieces, on any device."""
    decay, beta1, beta2, step_size, scale, eps = scalars
    flat, gradients = param.view(-1), grad.contiguous().view(-1)
    for place, at in chosen_indices(places):
        m, v = (tensor.view(-1)[place : place + at.shape[0]] for tensor in (first, second))
        g = gradients[at].to(m.dtype) * clip.to(m.dtype)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w = flat[at].to(m.dtype).mul_(decay).addcdiv_(m, (v.sqrt() * scale).add_(eps), value=-step_size)
        flat[at] = w.to(flat.dtype)


def _cpu(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
    instruction_set: str = "",
) -> None:
    """C++ (csrc/cpu/masked_step.cpp)."""
    native_step("adamw", param, grad, None, (first, second), places, clip, scalars, instruction_set)


@torch.library.custom_op("fillm_kernels::masked_adamw_", mutates_args=("params", "firsts", "seconds"))
def _op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    masks: Sequence[Tensor],
    starts: Sequence[Tensor],
    sizes: Sequence[int],
    clip: Tensor,
    rate: Tensor,
    step: int,
    scalars: Sequence[float],
) -> None:
    stepped = Stepped(params, grads, firsts, seconds, masks, starts, sizes)
    places = check_steps(stepped)
    check_apart(stepped)
    # Made of numbers here, not before: a graph of torch.compile then serves every step.
    (decay, beta1, beta2, eps), lr = scalars, value_of(rate)
    scalars = [1 - lr * decay, beta1, beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps]
    for run, *own in zip(select_each("masked_adamw_", params), *stepped[:4], places, strict=True):
        run(*own, clip, scalars)


@_op.register_fake
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    masks: Sequence[Tensor],
    starts: Sequence[Tensor],
    sizes: Sequence[int],
    clip: Tensor,
    rate: Tensor,
    step: int,
    scalars: Sequence[float],
) -> None:
    check_steps(Stepped(params, grads, firsts, seconds, masks, starts, sizes))


register(
    "masked_adamw_",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("masked_adamw", dtypes=()),
    torch=Backend(on_torch),
    reference=Backend(_reference),
)
