"""The C++ product of `fillm_kernels` beside torch's, and beside oneDNN, which torch carries too."""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels.products import linear

from benchmarks.kernels.layers import LAYERS, Calls, Layer, report


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x W^T` through the operator that torch's compiler uses for it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def check() -> None:
    x, weight = torch.randn(300, 200), torch.randn(150, 200)
    torch.testing.assert_close(linear(x, weight).double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-3)


def prepare(layer: Layer) -> tuple[Calls, float]:
    x, _, _ = layer.build()
    weight = torch.randn(layer.outputs, layer.inputs)
    calls: Calls = {"linear": lambda: linear(x, weight), "torch": lambda: torch.nn.functional.linear(x, weight)}
    if torch.backends.mkldnn.is_available():
        calls = {**calls, "onednn": lambda: onednn(x, weight)}
    return calls, 2.0 * layer.tokens * layer.samples * layer.inputs * layer.outputs


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_linear(benchmark, layer):
    check()
    x, _, _ = layer.build()
    benchmark(linear, x, torch.randn(layer.outputs, layer.inputs))


def main(argv: Sequence[str] | None = None) -> None:
    report("linear", prepare, check, argv)


if __name__ == "__main__":
    main()
