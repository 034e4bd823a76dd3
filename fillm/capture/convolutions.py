"""Depthwise convolutions along the sequence, as state-space layers and linear attention have them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fillm.capture.boundaries import NoTorchFunction, Site
from fillm.capture.gradients import DenseGradients


class ConvolutionBoundary(torch.autograd.Function):
    """`y[b, c, l] = sum_k x[b, c, l + k] w[c, 0, k] + bias[c]` on padded `x`, one filter a channel."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, site: Site
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.site = padding, site
        return F.conv1d(x, weight, bias, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with NoTorchFunction():
            ctx.site(x.detach(), dy)
            dx = None
            if ctx.needs_input_grad[1]:
                dx = F.conv_transpose1d(dy, weight, padding=ctx.padding, groups=x.shape[1])
        return None, dx, None, None, None, None


def convolution(
    rules: Any,
    find: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """The rule of `conv1d`: stride and dilation 1, one filter a channel, a sample a row of the batch.

    A sample's gradient of the filters, `sum_l dy[c, l] x[c, l + k]`, is as small as they are: it is formed.
    """
    stride, padding, dilation = (
        value[0] if isinstance(value, list | tuple) else value for value in (stride, padding, dilation)
    )
    by_sample = input.ndim == 3 and input.shape[0] == rules.rows.num_samples
    depthwise = weight.ndim == 3 and weight.shape[0] == groups == input.shape[1]
    if find(input) or not by_sample or not depthwise or (stride, dilation) != (1, 1) or isinstance(padding, str):
        return NotImplemented
    filters, shift = find(weight), find(bias)

    def site(x: Tensor, dy: Tensor) -> None:
        if filters is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            windows = F.pad(x, (padding, padding)).unfold(2, weight.shape[2], 1)  # [B, C, L, K]
            formed = torch.einsum("bcl,bclk->bck", dy.to(wide), windows.to(wide))[:, :, None]
            rules.deliver(filters.name, DenseGradients(filters.to_parameter(formed)))
        if shift is not None:
            count, channels, length = dy.shape
            offsets = torch.arange(count + 1, device=dy.device) * length
            rows = dy.transpose(1, 2).reshape(-1, channels)
            rules.deliver(shift.name, rules.shift_gradients(shift, rows, offsets))

    for record in (filters, shift):
        if record is not None:
            rules.used(record.name)
    return ConvolutionBoundary.apply(rules.anchor, input, weight, bias, padding, site)
