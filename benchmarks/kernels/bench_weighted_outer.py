"""`weighted_outer_` beside the library's weight-gradient product of the same shape."""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels import weighted_outer_

from benchmarks.kernels.layers import LAYERS, Calls, Layer, report


def check() -> None:
    layer = Layer(45, 3, 130, 70, zero=0.2)
    x, dy, offsets = layer.build()
    weights = torch.randn(3)
    want = (dy * weights.repeat_interleave(45)[:, None]).double().T @ x.double()
    got = weighted_outer_(torch.zeros(70, 130), x, dy, weights, offsets)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def prepare(layer: Layer) -> tuple[Calls, float]:
    x, dy, offsets = layer.build()
    weights, out = torch.randn(layer.samples), torch.zeros(layer.outputs, layer.inputs)
    used = layer.tokens - int(layer.zero * layer.tokens)
    calls = {
        "weighted_outer_": lambda: weighted_outer_(out, x, dy, weights, offsets),
        "unweighted": lambda: weighted_outer_(out, x, dy, None, offsets),
        "gemm": lambda: out.addmm_(dy.T, x),
    }
    return calls, 2.0 * used * layer.samples * layer.inputs * layer.outputs


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_weighted_outer(benchmark, layer):
    check()
    x, dy, offsets = layer.build()
    out = torch.zeros(layer.outputs, layer.inputs)
    benchmark(weighted_outer_, out, x, dy, torch.randn(layer.samples), offsets)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_gemm(benchmark, layer):
    x, dy, _ = layer.build()
    out = torch.zeros(layer.outputs, layer.inputs)
    benchmark(lambda: out.addmm_(dy.T, x))


def main(argv: Sequence[str] | None = None) -> None:
    report("weighted_outer_", prepare, check, argv)


if __name__ == "__main__":
    main()
