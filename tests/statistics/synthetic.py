"""Per-sample gradients made to order, of several shapes and scales, and the exact weighted sum of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fillm.capture.gradients import DenseGradients

# Eight entries; a norm's worth; one above the size up to which expansion terms are kept.
SHAPES = {"scalars": (8,), "norm": (256,), "matrix": (160, 128)}
COUNT, BATCH = 60, 7


def mixed_scales(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`v`, and `g` [60, *shape] of which every third sample is 10^4 times smaller: float32, correlated with `v`."""
    generator = torch.Generator().manual_seed(seed)
    v, g = {}, {}
    for name, shape in SHAPES.items():
        v[name] = torch.randn(shape, generator=generator)
        scales = torch.rand(COUNT, generator=generator) + 0.5
        scales[::3] *= 1e-4
        noise = torch.randn(COUNT, *shape, generator=generator)
        g[name] = scales.view(-1, *[1] * len(shape)) * (noise + 0.7 * v[name])
    return v, g


def batches(g: dict[str, Tensor], positions: list[int] | None = None) -> Iterator[tuple[str, DenseGradients, Tensor]]:
    """What a pass would hand to `observe`, batch by batch."""
    chosen = list(range(COUNT)) if positions is None else positions
    for start in range(0, len(chosen), BATCH):
        where = torch.tensor(chosen[start : start + BATCH])
        for name, values in g.items():
            yield name, DenseGradients(values[where]), where


def exact_weighted_sum(g: Tensor, v: Tensor, damping: float) -> Tensor:
    """`w = (1/n) sum_i c_i g_i` of method.md (2), in float64."""
    wide, direction = g.double().flatten(1), v.double().flatten()
    q, d = wide.square().sum(1), wide @ direction
    lambda_ = damping * float(q.mean()) / v.numel()
    return ((d / (lambda_ + q)) @ wide / len(g)).view_as(v)
