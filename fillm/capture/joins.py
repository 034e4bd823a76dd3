"""What a layer joins to an activation from a parameter that it repeats for every sample, such as attention's sinks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fillm.capture.boundaries import NoTorchFunction, Site
from fillm.capture.gradients import DenseGradients


class JoinBoundary(torch.autograd.Function):
    """`cat(pieces, dim)`, of which the piece at `place` is made from a parameter."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, dim: int, place: int, site: Site, *pieces: Tensor) -> Tensor:
        ctx.dim, ctx.place, ctx.site = dim, place, site
        ctx.sizes = [piece.shape[dim] for piece in pieces]
        ctx.dtypes = [piece.dtype for piece in pieces]
        return torch.cat(pieces, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = list(dy.split(ctx.sizes, ctx.dim))
        with NoTorchFunction():
            ctx.site(parts[ctx.place])
        parts[ctx.place] = None
        needed = ctx.needs_input_grad[4:]
        given = [
            part.to(dtype) if part is not None and asked else None
            for part, dtype, asked in zip(parts, ctx.dtypes, needed, strict=True)
        ]
        return None, None, None, None, *given


def joined(rules: Any, find: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """The rule of `cat`: one piece is a parameter, expanded over the samples of a padded batch."""
    places = [place for place, piece in enumerate(tensors) if find(piece) is not None]
    if len(places) != 1 or rules.rows.packed:
        return NotImplemented
    (place,) = places
    record, piece, samples = find(tensors[place]), tensors[place], rules.rows.num_samples
    repeated = piece.ndim > 2 and piece.shape[0] == samples and (samples == 1 or piece.stride(0) == 0)
    if not repeated or dim % piece.ndim == 0:
        return NotImplemented

    def site(dy: Tensor) -> None:
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
        formed = []  # one by one: a parameter's piece of all samples at once would take as many times the memory
        for sample in range(samples):
            own = torch.zeros_like(wide)
            own[sample] = wide[sample]
            formed.append(record.to_parameter(own[None]))
        rules.deliver(record.name, DenseGradients(torch.cat(formed)))

    rules.used(record.name)
    return JoinBoundary.apply(rules.anchor, dim, place, site, *tensors)
