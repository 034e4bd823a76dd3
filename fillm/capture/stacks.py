"""Stacks of matrices `[E, I, O]` of which every token uses all: shared experts, gates of diagonal blocks."""

from typing import Any

import torch
from torch import Tensor

from fillm.capture.boundaries import NoTorchFunction, Site
from fillm.capture.combined import StackedGradients
from fillm.capture.gradients import DenseGradients, OuterGradients
from fillm.capture.segments import segment_sum


class StackBoundary(torch.autograd.Function):
    """`y[e] = x[e] W[e] + b[e]`, x [E, N, I], W [E, I, O], b [E, 1, O] or None."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.site = site
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with NoTorchFunction():
            ctx.site(x.detach(), dy)
            dx = torch.bmm(dy, weight.mT) if ctx.needs_input_grad[1] else None
        return None, dx, None, None, None


def stacked(rules: Any, find: Any, input: Tensor, mat2: Tensor) -> Any:
    """The rule of `bmm`."""
    return with_bias(rules, find, None, input, mat2)


def with_bias(rules: Any, find: Any, input: Tensor | None, batch1: Tensor, batch2: Tensor, **scales: Any) -> Any:
    """The rule of `baddbmm`: rows of every matrix are all tokens, in order."""
    x, weight, bias = batch1, batch2, input
    stack, shift = find(weight), find(bias)
    lead = x.shape[1:2]
    if find(x) or x.ndim != 3 or weight.ndim != 3 or not rules.rows.holds_tokens(lead):
        return NotImplemented
    if any(value != 1 for value in scales.values()) or (bias is not None and bias.shape[1] != 1):
        return NotImplemented
    if weight.requires_grad or (stack is not None and not (stack.is_parameter or stack.transposed)):
        return NotImplemented
    offsets = rules.rows.row_offsets(lead)
    samples = offsets.numel() - 1

    def site(x: Tensor, dy: Tensor) -> None:
        if stack is not None:
            parts = {e: OuterGradients(x[e], dy[e], offsets, not stack.transposed) for e in range(len(x))}
            shape = weight.mT.shape if stack.transposed else weight.shape
            rules.deliver(stack.name, StackedGradients(parts, shape, samples))
        if shift is not None:
            wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
            summed = segment_sum(wide.transpose(0, 1), offsets)[:, :, None]  # [B, E, 1, O]
            rules.deliver(shift.name, DenseGradients(shift.to_parameter(summed)))

    for record in (stack, shift):
        if record is not None:
            rules.used(record.name)
    return StackBoundary.apply(rules.anchor, x, weight, bias, site)
