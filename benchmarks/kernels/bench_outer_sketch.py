"""`outer_sketch` beside forming every gradient and sketching it, with `sketch` and with a table and `index_add_`."""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels import outer_sketch, sample_moments, sketch
from torch import Tensor

from benchmarks.kernels.bench_sketch import by_table, table
from benchmarks.kernels.layers import LAYERS, Calls, Layer, report

DIM = 4096
KINDS = ("oporp", "sjlt")
MOST_ENTRIES = 1 << 26  # 256 MiB of gradients


def gradients(x: Tensor, dy: Tensor, samples: int) -> Tensor:
    """Every per-sample gradient: x [B T, I], dy [B T, O] -> [B, O I]."""
    return torch.bmm(dy.view(samples, -1, dy.shape[1]).mT, x.view(samples, -1, x.shape[1])).flatten(1)


def check() -> None:
    x, dy, offsets = Layer(45, 3, 130, 70, zero=0.2).build()
    want = by_table(gradients(x, dy, 3), 256, *table(130 * 70, 256, "oporp"))
    torch.testing.assert_close(outer_sketch(x, dy, offsets, 256, "oporp", 1), want, rtol=1e-4, atol=1e-3)


def prepare(layer: Layer, kind: str) -> tuple[Calls, float]:
    x, dy, offsets = layer.build()
    used = layer.tokens - int(layer.zero * layer.tokens)
    calls: Calls = {
        "outer_sketch": lambda: outer_sketch(x, dy, offsets, DIM, kind, 1),
        "norm alone": lambda: sample_moments(x, dy, offsets),
        "gemm": lambda: dy.T @ x,
    }
    if layer.samples * layer.inputs * layer.outputs <= MOST_ENTRIES:
        calls = {**calls, "formed, sketch": lambda: sketch(gradients(x, dy, layer.samples), DIM, kind, 1)}
    if kind == "oporp" and layer.samples * layer.inputs * layer.outputs <= MOST_ENTRIES // 8:
        bins, signs = table(layer.inputs * layer.outputs, DIM, kind)
        calls = {**calls, "formed, index_add": lambda: by_table(gradients(x, dy, layer.samples), DIM, bins, signs)}
    return calls, 2.0 * used * layer.samples * layer.inputs * layer.outputs


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_outer_sketch(benchmark, layer):
    check()
    benchmark(outer_sketch, *layer.build(), DIM, "oporp", 1)


def main(argv: Sequence[str] | None = None) -> None:
    report("outer_sketch", prepare, check, argv, KINDS)


if __name__ == "__main__":
    main()
