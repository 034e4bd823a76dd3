"""`masked_sophia_`: one Sophia step on the weights in a mask, and on nothing else.

    h <- b2 h + (1 - b2) estimate      on the steps that bring an estimate, every k-th
    m <- b1 m + (1 - b1) g
    w <- (1 - lr wd) w - lr clip(m / max(gamma h, eps), 1)      for every weight of the mask

Liu et al., arXiv 2305.14342, Algorithm 3. For Sophia-G the estimate is that of Gauss, Newton and Bartlett, Algorithm 2:
the batch size times the squared gradient of the batch's mean loss, with labels drawn from the model's own prediction.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fillm_kernels.dispatch import Backend, register, select_each, triton_backend
from fillm_kernels.masked_step import (
    Stepped,
    as_factor,
    as_rate,
    as_stepped,
    check_apart,
    check_rates,
    check_steps,
    detached,
    native_step,
    value_of,
)
from fillm_kernels.selection import Places, Selection, chosen_indices


def masked_sophia_(
    param: Tensor | Sequence[Tensor] | Any,
    grad: Tensor | Sequence[Tensor] | Any,
    state: tuple[Tensor | Any, Tensor | Any] | Sequence[tuple[Tensor | Any, Tensor | Any]],
    mask: Selection | Tensor | Sequence[Selection | Tensor] | Any,
    *,
    estimate: Tensor | Sequence[Tensor] | Any | None = None,
    lr: Tensor | float = 1e-4,
    betas: tuple[float, float] = (0.96, 0.99),
    gamma: float = 0.01,
    eps: float = 1e-12,
    weight_decay: float = 0.1,
    clip: Tensor | float = 1.0,
) -> Tensor | list[Tensor]:
    """Take one Sophia step on the masked weights of a parameter, or of several together, in place.

    Weights outside the mask keep their bits: neither step, nor momentum, nor decay reaches them. Arithmetic is float32
    (float64 for float64 parameters); bfloat16 and float16 parameters are widened and rounded back to the nearest, ties
    to even, so that a change under half a unit in the last place is lost.

    Lists of parameters, gradients, states and masks, on one device, are stepped one after the other in one call of the
    registered op, whose passage through torch takes longer than a small step. An error leaves all of them as they were.

    Args:
        param: the parameter, any shape, contiguous, float32 | bfloat16 | float16 | float64; changed.
        grad: its gradient, same shape, same dtype or float32; any strides (a strided one is copied).
        state: (exp_avg, hessian), float32 (float64 for float64 parameters), one entry a selected weight in the order
            of flat indices, as `Selection.new_state` makes them; changed.
        mask: a `Selection`, bits [ceil(P / 8)] uint8 as `top_mask` gives them, or rows [R] int64. Bits and rows are
            turned into a selection at every call; make the selection once where steps repeat.
        estimate: the diagonal Hessian estimate of this step, not negative, shape and dtypes as `grad`, or None on the
            steps that keep the last one; a list where `grad` is one.
        lr: learning rate, eta of the paper, schedule included, a number or a scalar tensor (on the CPU, to spare a
            synchronisation); torch.compile takes a number for a constant.
        betas: decay rates of gradient and Hessian averages.
        gamma: scale of the Hessian; the larger, the fewer updates are clipped.
        eps: least divisor.
        weight_decay: lambda of the paper, decoupled, of masked weights only.
        clip: factor of the gradient, not of the estimate; a number or a scalar tensor (which spares a CUDA device a
            synchronisation).

    Returns:
        `param` as a tensor, or a list of them.

    Raises:
        ShapeError: if sizes do not fit, `param` or state is not contiguous, or a rate is negative.
        DtypeError, DeviceError: if dtypes or devices do not go together.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    check_rates(betas, eps, weight_decay)
    result, stepped = as_stepped(param, grad, state, mask)
    estimates = [] if estimate is None else estimate if isinstance(result, list) else [estimate]
    scalars = [weight_decay, *betas, gamma, eps]
    _op(*stepped, detached(estimates, "estimate"), as_factor(clip, stepped.params[0]), as_rate(lr), scalars)
    return result


def _reference(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    estimate: Tensor | None,
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
) -> None:
    """The definition in float64, rounded once; the oracle of the tests."""
    decay, beta1, beta2, step_size, gamma, eps = scalars
    for place, at in chosen_indices(places):
        state = slice(place, place + at.shape[0])
        g = grad.flatten()[at].double() * clip
        m = beta1 * first.view(-1)[state].double() + (1 - beta1) * g
        h = second.view(-1)[state].double()
        if estimate is not None:
            h = beta2 * h + (1 - beta2) * estimate.flatten()[at].double()
        update = (m / (gamma * h).clamp(min=eps)).clamp(-1, 1)
        w = decay * param.view(-1)[at].double() - step_size * update
        first.view(-1)[state], second.view(-1)[state] = m.to(first.dtype), h.to(second.dtype)
        param.view(-1)[at] = w.to(param.dtype)


def on_torch(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    estimate: Tensor | None,
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
) -> None:
    """Torch's operators on gathered pieces, on any device."""
    decay, beta1, beta2, step_size, gamma, eps = scalars
    flat, gradients = param.view(-1), grad.contiguous().view(-1)
    for place, at in chosen_indices(places):
        m, h = (tensor.view(-1)[place : place + at.shape[0]] for tensor in (first, second))
        m.lerp_(gradients[at].to(m.dtype) * clip.to(m.dtype), 1 - beta1)
        if estimate is not None:
            h.lerp_(estimate.flatten()[at].to(h.dtype), 1 - beta2)
        update = (m / (gamma * h).clamp_(min=eps)).clamp_(-1, 1)
        w = flat[at].to(m.dtype).mul_(decay).sub_(update, alpha=step_size)
        flat[at] = w.to(flat.dtype)


def _cpu(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    estimate: Tensor | None,
    places: Places,
    clip: Tensor,
    scalars: Sequence[float],
    instruction_set: str = "",
) -> None:
    """C++ (csrc/cpu/masked_step.cpp)."""
    native_step("sophia", param, grad, estimate, (first, second), places, clip, scalars, instruction_set)


@torch.library.custom_op("fillm_kernels::masked_sophia_", mutates_args=("params", "firsts", "seconds"))
def _op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    masks: Sequence[Tensor],
    starts: Sequence[Tensor],
    sizes: Sequence[int],
    estimates: Sequence[Tensor],
    clip: Tensor,
    rate: Tensor,
    scalars: Sequence[float],
) -> None:
    stepped = Stepped(params, grads, firsts, seconds, masks, starts, sizes)
    places = check_steps(stepped, estimates)
    check_apart(stepped, estimates)
    (decay, beta1, beta2, gamma, eps), lr = scalars, value_of(rate)
    scalars = [1 - lr * decay, beta1, beta2, lr, gamma, eps]
    runs, estimates = select_each("masked_sophia_", params), estimates or [None] * len(params)
    for run, *own in zip(runs, *stepped[:4], estimates, places, strict=True):
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
    estimates: Sequence[Tensor],
    clip: Tensor,
    rate: Tensor,
    scalars: Sequence[float],
) -> None:
    check_steps(Stepped(params, grads, firsts, seconds, masks, starts, sizes), estimates)


register(
    "masked_sophia_",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("masked_sophia", dtypes=()),
    torch=Backend(on_torch),
    reference=Backend(_reference),
)
