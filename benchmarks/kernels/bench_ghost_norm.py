"""`ghost_norm` beside two padded batched products, the layer's own weight-sized product, and opacus if it is there."""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels import ghost_norm
from torch import Tensor

from benchmarks.kernels.layers import LAYERS, Calls, Layer, report
from benchmarks.kernels.peers import missing, opacus_norms


def batched_products(x: Tensor, dy: Tensor, samples: int) -> Tensor:
    """The same norms as two [B, T, T] Gram matrices: x [B T, I], dy [B T, O] -> [B]."""
    inside, outside = x.view(samples, -1, x.shape[1]), dy.view(samples, -1, dy.shape[1])
    return (torch.bmm(inside, inside.mT) * torch.bmm(outside, outside.mT)).sum((1, 2))


def check() -> None:
    layer = Layer(45, 3, 130, 70, zero=0.2)
    x, dy, offsets = layer.build()
    want = batched_products(x.double(), dy.double(), layer.samples)
    torch.testing.assert_close(ghost_norm(x, dy, offsets).double(), want, rtol=1e-5, atol=0)


def prepare(layer: Layer) -> tuple[Calls, float]:
    x, dy, offsets = layer.build()
    v = torch.randn(layer.outputs, layer.inputs)
    used = layer.tokens - int(layer.zero * layer.tokens)
    flop = layer.samples * used * (used + 1) * (layer.inputs + layer.outputs)
    calls: Calls = {
        "ghost_norm": lambda: ghost_norm(x, dy, offsets),
        "bmm": lambda: batched_products(x, dy, layer.samples),
        "gemm": lambda: dy @ v,
    }
    peer = opacus_norms(x, dy, layer.samples)
    return {**calls, "opacus": peer} if peer else calls, flop


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_ghost_norm(benchmark, layer):
    check()
    benchmark(ghost_norm, *layer.build())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_batched_products(benchmark, layer):
    x, dy, _ = layer.build()
    benchmark(batched_products, x, dy, layer.samples)


def main(argv: Sequence[str] | None = None) -> None:
    report("ghost_norm", prepare, check, argv)
    print(missing("opacus"))


if __name__ == "__main__":
    main()
