"""`ghost_dot` beside the library product of the same shape, and beside an einsum that forms every gradient."""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels import ghost_dot
from torch import Tensor

from benchmarks.kernels.layers import LAYERS, Calls, Layer, report


def formed(x: Tensor, dy: Tensor, v: Tensor, samples: int) -> Tensor:
    """The same dots through [B, O, I] gradients: x [B T, I], dy [B T, O], v [O, I] -> [B]."""
    gradients = torch.bmm(dy.view(samples, -1, dy.shape[1]).mT, x.view(samples, -1, x.shape[1]))
    return torch.einsum("boi,oi->b", gradients, v)


def check() -> None:
    layer = Layer(45, 3, 130, 70, zero=0.2)
    x, dy, offsets = layer.build()
    v = torch.randn(70, 130)
    want = formed(x.double(), dy.double(), v.double(), layer.samples)
    torch.testing.assert_close(ghost_dot(x, dy, v, offsets).double(), want, rtol=1e-4, atol=1e-2)


def prepare(layer: Layer) -> tuple[Calls, float]:
    x, dy, offsets = layer.build()
    v = torch.randn(layer.outputs, layer.inputs)
    used = layer.tokens - int(layer.zero * layer.tokens)
    calls: Calls = {"ghost_dot": lambda: ghost_dot(x, dy, v, offsets), "gemm": lambda: dy @ v}
    if layer.samples * layer.inputs * layer.outputs <= 1 << 24:
        calls = {**calls, "formed": lambda: formed(x, dy, v, layer.samples)}
    return calls, 2.0 * used * layer.samples * layer.inputs * layer.outputs


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_ghost_dot(benchmark, layer):
    check()
    x, dy, offsets = layer.build()
    benchmark(ghost_dot, x, dy, torch.randn(layer.outputs, layer.inputs), offsets)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_gemm(benchmark, layer):
    _, dy, _ = layer.build()
    benchmark(torch.mm, dy, torch.randn(layer.outputs, layer.inputs))


def main(argv: Sequence[str] | None = None) -> None:
    report("ghost_dot", prepare, check, argv)


if __name__ == "__main__":
    main()
