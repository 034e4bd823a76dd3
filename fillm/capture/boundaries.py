"""The operations at which a parameter meets an activation, as autograd functions that report what they see.

Each computes the ordinary forward and the ordinary gradient of its activation, and hands the factors of the parameter's
per-sample gradients to `site`. The parameter itself never receives a gradient. Inputs are kept through
`save_for_backward`, so gradient checkpointing recomputes them like any other activation.

What `site` is handed has no graph: kept by whoever `site` tells of it, a graph that leads back to `site` would be a
cycle through autograd's own nodes, which Python cannot collect, and with it every activation and the model stay.

`anchor` is a scalar that requires a gradient: it makes autograd come by even where no activation below does.
"""

from collections.abc import Callable
from typing import Any

import torch
from fillm_kernels.products import linear
from torch import Tensor

NoTorchFunction = torch._C.DisableTorchFunction
Site = Callable[..., None]


class LinearBoundary(torch.autograd.Function):
    """`y = x W^T + b` with `W [O, I]`, or `y = x W + b` with `W [I, O]` when `transposed`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, site: Site
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.site = transposed, site
        y = linear(x, weight.T if transposed else weight, bias)
        # A view that a function of one's own returns may not be changed in place, and some models add to it.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with NoTorchFunction():
            ctx.site(x.detach(), dy)
            dx = linear(dy, weight if ctx.transposed else weight.T) if ctx.needs_input_grad[1] else None
        return None, dx, None, None, None, None


class LookupBoundary(torch.autograd.Function):
    """`y = W[ids]`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, weight: Tensor, site: Site) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.site = site
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        with NoTorchFunction():
            ctx.site(ids, dy)
        return None, None, None, None


class ProductBoundary(torch.autograd.Function):
    """`y = h * w` with `w` broadcast to `h`'s last dimensions, and what of these is 1 to `w`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, h: Tensor, w: Tensor, site: Site) -> Tensor:
        ctx.save_for_backward(h, w)
        ctx.site = site
        return h * w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, w = ctx.saved_tensors
        with NoTorchFunction():
            ctx.site(h.detach(), dy)
            dh = (dy * w).sum_to_size(h.shape).to(h.dtype) if ctx.needs_input_grad[1] else None
        return None, dh, None, None


class ShiftBoundary(torch.autograd.Function):
    """`y = h + w` with `w` broadcast to `h`'s last dimensions, and what of these is 1 to `w`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, h: Tensor, w: Tensor, site: Site) -> Tensor:
        ctx.site, ctx.dtype, ctx.shape = site, h.dtype, h.shape
        return h + w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with NoTorchFunction():
            ctx.site(dy)
        return None, dy.sum_to_size(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[1] else None, None, None
