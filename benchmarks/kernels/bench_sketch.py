"""`sketch` beside a copy of its input, a table of bins and signs with `index_add_`, and public projections.

python -m benchmarks.kernels.bench_sketch [--threads N] [--csv FILE]

GB/s count the input's bytes once. The ceiling is `torch.Tensor.copy_` of the same input in the same rounds, its bytes
read and written. Slow calls are timed in three rounds; `index_add_` on one vector, times their number.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest
import torch
from fillm_kernels import sketch
from fillm_kernels.seed_law import BlockMap
from torch import Tensor

from benchmarks.kernels.layers import interleaved
from benchmarks.kernels.memory import extra_bytes, mebibytes
from benchmarks.kernels.peers import Call, missing, scipy_sparse, sklearn_sparse, trak_basic
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
    (8, 65_536, 2048, "oporp", torch.float32),
    (8, 65_536, 64, "rademacher", torch.float32),
    (8, 65_536, 64, "gaussian", torch.float32),
)
DENSE_ENTRIES = 1 << 27  # of a dense matrix that peers may make or keep
ROUNDS, SLOW_ROUNDS = 9, 3


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


def baselines(g: Tensor, dim: int) -> dict[str, Call]:
    """What is timed in a few rounds beside the op, by name; packages that are not there are left out."""
    count = g.shape[1]
    bins, signs = table(count, dim, "oporp")
    found: dict[str, Call | None] = {"scipy CSR": scipy_sparse(g, bins, signs, dim)}
    if count * dim <= DENSE_ENTRIES:
        matrix = torch.randn(count, dim).to(g.dtype)
        found["dense kept"] = lambda: g @ matrix
        found["traker BasicProjector"] = trak_basic(g, dim)
        found["sklearn sparse"] = sklearn_sparse(g, dim)
    return {name: call for name, call in found.items() if call is not None}


def row_of(samples: int, count: int, dim: int, kind: str, dtype: torch.dtype, threads: int) -> dict[str, object]:
    """One shape: the op and a copy in the same rounds, then what is slower."""
    g = torch.randn(samples, count).to(dtype)
    copy = torch.empty_like(g)
    calls = {"sketch": lambda: sketch(g, dim, kind, 1), "copy": lambda: copy.copy_(g)}
    seconds = interleaved(calls, ROUNDS)
    bins, signs = table(count, dim, "oporp")
    slow = {"index_add": lambda: by_table(g[:1], dim, bins, signs), **baselines(g, dim)}
    middle = {name: median(values) for name, values in interleaved(slow, SLOW_ROUNDS).items()}
    middle["index_add"] *= samples
    own, ceiling = median(seconds["sketch"]), 2 * g.nbytes / median(seconds["copy"])
    return {
        "op": "sketch",
        "shape": f"B={samples} P={count} k={dim} {kind} {str(dtype).removeprefix('torch.')}",
        "threads": threads,
        "milliseconds": f"{1e3 * own:.3f}",
        "spread": f"{1e3 * min(seconds['sketch']):.3f}-{1e3 * max(seconds['sketch']):.3f}",
        "gbytes": f"{g.nbytes / own / 1e9:.2f}",
        "copy_gbytes": f"{ceiling / 1e9:.2f}",
        "of_copy": f"{g.nbytes / own / ceiling:.2f}",
        **{f"{name} / op": f"{value / own:.1f}" for name, value in middle.items()},
        "extra MiB": mebibytes(extra_bytes(calls["sketch"])),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="sketch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    check()
    rows = []
    for shape in SHAPES:
        rows.append(row_of(*shape, options.threads))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    save(options.csv, rows)
    print(missing("scipy", "scikit-learn", "traker"))


if __name__ == "__main__":
    main()
