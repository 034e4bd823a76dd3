"""`ghost_gram` beside two whole products of all pairs of rows, and beside gradients that are formed."""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels import ghost_gram
from torch import Tensor

from benchmarks.kernels.layers import LAYERS, Calls, Layer, report

MOST_PAIRS = 1 << 24  # pairs of rows that `whole` may hold at once


def whole(x: Tensor, dy: Tensor, samples: int) -> Tensor:
    """The same Gram matrix through two [N, N] matrices: x [B T, I], dy [B T, O] -> [B, B]."""
    pairs = (x @ x.T) * (dy @ dy.T)
    tokens = x.shape[0] // samples
    return pairs.view(samples, tokens, samples, tokens).sum((1, 3))


def formed(x: Tensor, dy: Tensor, samples: int) -> Tensor:
    """The same Gram matrix through [B, O I] gradients: x [B T, I], dy [B T, O] -> [B, B]."""
    gradients = torch.bmm(dy.view(samples, -1, dy.shape[1]).mT, x.view(samples, -1, x.shape[1])).flatten(1)
    return gradients @ gradients.T


def check() -> None:
    layer = Layer(45, 3, 130, 70, zero=0.2)
    x, dy, offsets = layer.build()
    want = formed(x.double(), dy.double(), layer.samples)
    torch.testing.assert_close(ghost_gram(x, dy, offsets, x, dy, offsets).double(), want, rtol=1e-4, atol=1.0)


def prepare(layer: Layer) -> tuple[Calls, float]:
    x, dy, offsets = layer.build()
    used = layer.samples * (layer.tokens - int(layer.zero * layer.tokens))
    calls: Calls = {"ghost_gram": lambda: ghost_gram(x, dy, offsets, x, dy, offsets)}
    if x.shape[0] ** 2 <= MOST_PAIRS:
        calls = {**calls, "whole": lambda: whole(x, dy, layer.samples)}
    if layer.samples * layer.inputs * layer.outputs <= MOST_PAIRS:
        calls = {**calls, "formed": lambda: formed(x, dy, layer.samples)}
    return calls, 2.0 * used * used * (layer.inputs + layer.outputs)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_ghost_gram(benchmark, layer):
    check()
    x, dy, offsets = layer.build()
    benchmark(ghost_gram, x, dy, offsets, x, dy, offsets)


@pytest.mark.parametrize("layer", LAYERS[:4], ids=str)
def bench_whole(benchmark, layer):
    x, dy, _ = layer.build()
    benchmark(whole, x, dy, layer.samples)


def main(argv: Sequence[str] | None = None) -> None:
    report("ghost_gram", prepare, check, argv)


if __name__ == "__main__":
    main()
