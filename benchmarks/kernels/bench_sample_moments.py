"""`sample_moments` beside forming every gradient and squaring it, and beside `ghost_norm` and `ghost_dot` apart."""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels import ghost_dot, ghost_norm, sample_moments
from torch import Tensor

from benchmarks.kernels.layers import LAYERS, Calls, Layer, report


def formed(x: Tensor, dy: Tensor, v: Tensor, second: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The same through [B, O, I] gradients: norms, dots, and squares added to `second`."""
    gradients = torch.bmm(dy.view(samples, -1, dy.shape[1]).mT, x.view(samples, -1, x.shape[1]))
    squares = gradients.square()
    second += squares.sum(0)
    return squares.sum((1, 2)), torch.einsum("boi,oi->b", gradients, v)


def check() -> None:
    layer = Layer(45, 3, 130, 70, zero=0.2)
    x, dy, offsets = layer.build()
    v, second, want_second = torch.randn(70, 130), torch.zeros(70, 130), torch.zeros(70, 130, dtype=torch.float64)
    norms, dots = formed(x.double(), dy.double(), v.double(), want_second, layer.samples)
    found = sample_moments(x, dy, offsets, v, second)
    for got, want in ((found.squared_norms, norms), (found.dots, dots), (second, want_second)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-2)


def prepare(layer: Layer) -> tuple[Calls, float]:
    x, dy, offsets = layer.build()
    v, second = torch.randn(layer.outputs, layer.inputs), torch.zeros(layer.outputs, layer.inputs)
    used = layer.tokens - int(layer.zero * layer.tokens)
    calls: Calls = {
        "sample_moments": lambda: sample_moments(x, dy, offsets, v, second),
        "norm and dot alone": lambda: sample_moments(x, dy, offsets, v),
        "ghost_norm + ghost_dot": lambda: (ghost_norm(x, dy, offsets), ghost_dot(x, dy, v, offsets)),
        "gemm": lambda: dy @ v,
    }
    if layer.samples * layer.inputs * layer.outputs <= 1 << 26:
        calls = {**calls, "formed": lambda: formed(x, dy, v, second, layer.samples)}
    return calls, 2.0 * used * layer.samples * layer.inputs * layer.outputs


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_sample_moments(benchmark, layer):
    check()
    x, dy, offsets = layer.build()
    v, second = torch.randn(layer.outputs, layer.inputs), torch.zeros(layer.outputs, layer.inputs)
    benchmark(sample_moments, x, dy, offsets, v, second)


def main(argv: Sequence[str] | None = None) -> None:
    report("sample_moments", prepare, check, argv)


if __name__ == "__main__":
    main()
