"""`sketch` beside a copy of its input, and beside a table of bins and signs with `index_add_`.

python -m benchmarks.kernels.bench_sketch [--threads N] [--csv FILE]

GB/s count the input's bytes once. The ceiling is `torch.Tensor.copy_` of the same input in the same rounds, its bytes
read and written.
"""

import argparse
from pathlib import Path
from statistics import median

import pytest
import torch
from fillm_kernels import sketch
from fillm_kernels.seed_law import BlockMap
from torch import Tensor

from benchmarks.kernels.layers import interleaved
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sketch(benchmark, shape):
    check()
    samples, count, dim, kind, dtype = shape
    benchmark(sketch, torch.randn(samples, count).to(dtype), dim, kind, 1)


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
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "op"), flush=True)
    save(options.csv, rows)


if __name__ == "__main__":
    main()
