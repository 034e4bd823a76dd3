"""Sketches of gradients formed outright, by dense matrices from docs/seed-law.md: shares no code with the library."""

import math

import torch
from torch import Tensor

from tests.kernels import law

# What a tensor of one side takes in place of a two-sided kind.
FAMILY = {"factored": "gaussian", "factored-sjlt": "sjlt", "tensorsketch": "countsketch"}
ONE_SIDED = ("oporp", "countsketch", "sjlt", "gaussian", "rademacher")
KINDS = (*ONE_SIDED, *FAMILY)


def sketched(kind: str, dim: int, name: str, gradients: Tensor, seed: int) -> Tensor:
    """[B, *shape] -> [B, dim], float64: what every class of gradients has to give."""
    if gradients[0].numel() <= dim:
        return gradients.double().flatten(1)
    return _sketched(kind, dim, gradients.double(), law.tensor_seed(seed, name))


def _sketched(kind: str, dim: int, gradients: Tensor, seed: int) -> Tensor:
    if gradients.ndim > 3:
        parts = [
            _sketched(kind, dim, gradients[:, e], law.tensor_seed(seed, str(e))) for e in range(gradients.shape[1])
        ]
        return torch.stack(parts).sum(0)
    if kind in FAMILY and gradients.ndim == 3:
        half = dim // 2
        k_out = max(k for k in range(1, half + 1) if half % k == 0 and k * k <= half)
        dims = (half,) if kind == "tensorsketch" else (k_out, half // k_out)
        halves = [law.two_sided(kind, law.tensor_seed(seed, ab), dims, gradients) for ab in ("a", "b")]
        return torch.cat(halves, 1) / math.sqrt(2)
    flat = gradients.flatten(1)
    nonzeros = next(n for n in (4, 2, 1) if dim % n == 0)
    return flat @ law.projection(FAMILY.get(kind, kind), seed, dim, flat.shape[1], nonzeros=nonzeros)
