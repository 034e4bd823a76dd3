"""`factored_sketch` beside stored Gaussian sides with torch's products, and beside gradients that are formed.

Bytes: x and dy once, the result once. FLOP: those of the kind, docs/kernels/factored_sketch.md.
"""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from fillm_kernels import factored_sketch
from torch import Tensor

from benchmarks.kernels.bench_outer_sketch import gradients
from benchmarks.kernels.gpu_calls import TOLERANCE, reference, relative
from benchmarks.kernels.layers import LAYERS, Calls, Layer, report

SIDE = 64
KINDS = ("factored", "factored-sjlt", "tensorsketch")
MOST_ENTRIES = 1 << 26  # 256 MiB of gradients


def dims_of(kind: str, side: int = SIDE) -> int | tuple[int, int]:
    return side * side if kind == "tensorsketch" else (side, side)


def two_sided(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, samples: int) -> Tensor:
    """S_out G_b S_in^T from sketched rows: x [B T, I], dy [B T, O], left [O, k], right [I, k] -> [B, k k]."""
    return gradients(x @ right, dy @ left, samples)


def check() -> None:
    """The op beside its float64 reference, which forms every gradient."""
    layer = Layer(45, 3, 130, 70, zero=0.2)
    for kind in KINDS:
        call = partial(factored_sketch, *layer.build(), dims_of(kind, 16), kind, 1)
        error = relative(call(), reference(call))
        if not error <= TOLERANCE:
            raise AssertionError(f"{kind} is off by {error:.1e}")


def prepare(layer: Layer, kind: str) -> tuple[Calls, float]:
    x, dy, offsets = layer.build()
    left, right = torch.randn(layer.outputs, SIDE), torch.randn(layer.inputs, SIDE)
    calls: Calls = {
        "factored_sketch": lambda: factored_sketch(x, dy, offsets, dims_of(kind), kind, 1),
        "stored Gaussian sides": lambda: two_sided(x, dy, left, right, layer.samples),
    }
    if layer.samples * layer.inputs * layer.outputs <= MOST_ENTRIES:

        def formed() -> Tensor:
            blocks = gradients(x, dy, layer.samples).view(layer.samples, layer.outputs, layer.inputs)
            return torch.einsum("boi,ok,il->bkl", blocks, left, right)

        calls = {**calls, "formed, einsum": formed}
    rows = layer.tokens * layer.samples
    flop = {
        "factored": 2.0 * rows * SIDE * (layer.inputs + layer.outputs + SIDE),
        "factored-sjlt": 2.0 * rows * SIDE * SIDE,
        "tensorsketch": 2.0 * rows * (layer.inputs + layer.outputs + SIDE * SIDE * math.log2(SIDE * SIDE)),
    }
    return calls, flop[kind]


def moved(layer: Layer, kind: str) -> float:
    return 4.0 * layer.samples * (layer.tokens * (layer.inputs + layer.outputs) + SIDE * SIDE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS[1::2], ids=str)
def bench_factored_sketch(benchmark, layer, kind):
    check()
    benchmark(factored_sketch, *layer.build(), dims_of(kind), kind, 1)


def main(argv: Sequence[str] | None = None) -> None:
    report("factored_sketch", prepare, check, argv, KINDS, moved)


if __name__ == "__main__":
    main()
