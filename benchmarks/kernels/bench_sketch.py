"""`sketch` beside a copy of its input, and beside a table of bins and signs with `index_add_`; `outer_sketch` beside
forming every gradient and sketching it, and beside `sample_moments` without a sketch.

python -m benchmarks.kernels.bench_sketch [--threads N] [--csv FILE]

GB/s count the input's bytes once. The ceiling is `torch.Tensor.copy_` of the same input in the same rounds, its bytes
read and written.
"""

import argparse
from pathlib import Path
from statistics import median

import pytest
import torch
from fillm_kernels import outer_sketch, sample_moments, sketch
from fillm_kernels.seed_law import BlockMap
from torch import Tensor

from benchmarks.kernels.layers import LAYERS, Layer, interleaved
from benchmarks.kernels.rows import save

SHAPES = (
    # samples, coordinates, dim, kind, dtype; 5.2e6 is the largest weight of the measured model
    (8, 5_200_000, 4096, "oporp", torch.float32),
    (8, 5_200_000, 4096, "countsketch", torch.float32),
    (8, 5_200_000, 4096, "sjlt", torch.float32),
    (8, 5_200_000, 4096, "oporp", torch.bfloat16),
    (8, 5_200_000, 65536, "oporp", torch.float32),
    (8, 5_200_000, 256, "oporp", torch.float32),
    (1, 5_200_000, 4096, "oporp", torch.float32),
    (32, 262_144, 4096, "oporp", torch.float32),
)


def table(count: int, dim: int, kind: str) -> tuple[Tensor, Tensor]:
    """Bins and signs of the first chunk's map, [P] each: what the op does without."""
    bins, negative = BlockMap.of(kind, 1, dim, 4).place(torch.arange(count), 0)
    return bins, (1 - 2 * negative).float()


def by_table(g: Tensor, dim: int, bins: Tensor, signs: Tensor) -> Tensor:
    """G [B, P] -> [B, dim] by a scatter."""
    return g.new_zeros(g.shape[0], dim, dtype=torch.float32).index_add_(1, bins, g * signs)


def check() -> None:
    g = torch.randn(2, 100_000)
    want = by_table(g.double().float(), 1024, *table(100_000, 1024, "oporp"))
    torch.testing.assert_close(sketch(g, 1024, "oporp", 1), want, rtol=1e-4, atol=1e-4)
    x, dy, offsets = Layer(45, 3, 130, 70, zero=0.2).build()
    torch.testing.assert_close(
        outer_sketch(x, dy, offsets, 256, "oporp", 1), formed(x, dy, 3, 256, "oporp"), rtol=1e-4, atol=1e-3
    )


def formed(x: Tensor, dy: Tensor, samples: int, dim: int, kind: str) -> Tensor:
    """The same as `outer_sketch` through [B, O, I] gradients."""
    gradients = torch.bmm(dy.view(samples, -1, dy.shape[1]).mT, x.view(samples, -1, x.shape[1]))
    return sketch(gradients.flatten(1), dim, kind, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sketch(benchmark, shape):
    check()
    samples, count, dim, kind, dtype = shape
    benchmark(sketch, torch.randn(samples, count).to(dtype), dim, kind, 1)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_outer_sketch(benchmark, layer):
    check()
    benchmark(outer_sketch, *layer.build(), 4096, "oporp", 1)


def layer_row(layer: Layer, kind: str, threads: int, dim: int = 4096) -> dict[str, object]:
    """`outer_sketch` of one layer."""
    x, dy, offsets = layer.build()
    calls = {
        "op": lambda: outer_sketch(x, dy, offsets, dim, kind, 1),
        "no sketch": lambda: sample_moments(x, dy, offsets),
    }
    if layer.samples * layer.inputs * layer.outputs <= 1 << 26:  # 256 MiB of gradients
        calls["formed"] = lambda: formed(x, dy, layer.samples, dim, kind)
    seconds = interleaved(calls, rounds=9)
    middle = {name: median(values) for name, values in seconds.items()}
    return {
        "op": "outer_sketch",
        "shape": f"{layer} k={dim} {kind}",
        "threads": threads,
        "milliseconds": f"{1e3 * middle['op']:.3f}",
        "spread": f"{1e3 * min(seconds['op']):.3f}-{1e3 * max(seconds['op']):.3f}",
        "no sketch / op": f"{middle['no sketch'] / middle['op']:.2f}",
        "formed / op": f"{middle['formed'] / middle['op']:.2f}" if "formed" in middle else "",
    }


def show(row: dict[str, object]) -> None:
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="sketch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check()
    rows = []
    for samples, count, dim, kind, dtype in SHAPES:
        g = torch.randn(samples, count).to(dtype)
        copy, (bins, signs) = torch.empty_like(g), table(count, dim, kind)
        calls = {
            "sketch": lambda g=g, dim=dim, kind=kind: sketch(g, dim, kind, 1),
            "copy": lambda g=g, copy=copy: copy.copy_(g),
        }
        seconds = interleaved(calls, rounds=9)
        # Slower: one sample, three rounds, scaled.
        one = {"index_add": lambda g=g, dim=dim, bins=bins, signs=signs: by_table(g[:1], dim, bins, signs)}
        slow = median(interleaved(one, rounds=3)["index_add"]) * samples
        own, ceiling = median(seconds["sketch"]), 2 * g.nbytes / median(seconds["copy"])
        row = {
            "op": "sketch",
            "shape": f"B={samples} P={count} k={dim} {kind} {str(dtype).removeprefix('torch.')}",
            "threads": options.threads,
            "milliseconds": f"{1e3 * own:.3f}",
            "spread": f"{1e3 * min(seconds['sketch']):.3f}-{1e3 * max(seconds['sketch']):.3f}",
            "gbytes": f"{g.nbytes / own / 1e9:.2f}",
            "copy_gbytes": f"{ceiling / 1e9:.2f}",
            "of_copy": f"{g.nbytes / own / ceiling:.2f}",
            "index_add / op": f"{slow / own:.1f}",
        }
        rows.append(row)
        show(row)
    for layer in LAYERS:
        for kind in ("oporp", "sjlt"):
            rows.append(layer_row(layer, kind, options.threads))
            show(rows[-1])
    save(options.csv, rows)


if __name__ == "__main__":
    main()
