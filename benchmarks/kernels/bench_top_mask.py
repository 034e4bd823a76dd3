"""`top_mask` beside `torch.topk` on the scores joined in one tensor; bytes: three reads of the scores (two of bf16).

python -m benchmarks.kernels.bench_top_mask --billion [N] [--csv FILE]

takes 1e9 (or N) float32 scores in four tensors instead: time, memory beyond scores and bits, and every bit beside a
sort. It needs 12 GB and a few minutes.
"""

import argparse
from collections.abc import Sequence
from statistics import median

import numpy as np
import pytest
import torch
from fillm_kernels import top_mask
from torch import Tensor

from benchmarks.kernels.layers import COPY_ENTRIES, Calls, interleaved
from benchmarks.kernels.memory import extra_bytes, mebibytes
from benchmarks.kernels.rows import save
from benchmarks.kernels.streams import parser_of, report

ENTRIES = 1 << 25
CASES = {
    "normal float32 1%": (torch.float32, 0.01),
    "normal float32 50%": (torch.float32, 0.5),
    "normal bfloat16 10%": (torch.bfloat16, 0.1),
}
BLOCK = 1 << 24  # scores that are compared with the sort at a time; a multiple of 8


def scores_of(dtype: torch.dtype) -> list[Tensor]:
    return [part.clone() for part in torch.randn(ENTRIES).to(dtype).split([ENTRIES // 2, ENTRIES // 4, ENTRIES // 4])]


def check() -> None:
    scores = torch.randn(10_000)
    assert float(top_mask([scores], 700).threshold) == float(scores.topk(700).values[-1])


def prepare(dtype: torch.dtype, fraction: float) -> tuple[Calls, float]:
    scores, budget = scores_of(dtype), int(fraction * ENTRIES)
    calls = {
        "top_mask": lambda: top_mask(scores, budget),
        "cat + topk": lambda: torch.cat(scores).topk(budget, sorted=False),
    }
    return calls, must_move(dtype, ENTRIES)


def must_move(dtype: torch.dtype, entries: int) -> float:
    """Bytes of the reads that 16-bit digits take, and of the bits."""
    return (3 if dtype.itemsize == 4 else 2) * dtype.itemsize * entries + entries / 8


def wrong_bits(scores: Sequence[Tensor], bits: Sequence[Tensor], budget: int) -> int:
    """Bits that differ from those of a sort in which the first of equal scores comes first."""
    ordered = np.concatenate([part.numpy() for part in scores])
    ordered.sort()
    threshold = ordered[-budget]
    ties = budget - (len(ordered) - int(np.searchsorted(ordered, threshold, side="right")))
    del ordered
    wrong = 0
    for part, mask in zip(scores, bits, strict=True):
        for begin in range(0, part.numel(), BLOCK):
            block = part[begin : begin + BLOCK].numpy()
            level = block == threshold
            level &= level.cumsum() <= ties
            ties -= int(level.sum())
            want = np.packbits((block > threshold) | level, bitorder="little")
            got = mask[begin // 8 : begin // 8 + len(want)].numpy()
            wrong += int(np.unpackbits(want ^ got).sum())
    return wrong


def large(entries: int, options: argparse.Namespace) -> None:
    """One row: `entries` scores in four tensors of different sizes, a tenth of them chosen."""
    torch.set_num_threads(options.threads)
    check()
    sizes = [entries // 2, entries // 3, 1]
    sizes.append(entries - sum(sizes))
    scores, budget = [torch.randn(size) for size in sizes], entries // 10
    kept: list[list[Tensor]] = []
    extra = extra_bytes(lambda: kept.append(top_mask(scores, budget).bits))
    bits = kept.pop()
    if extra is not None:
        extra = max(0, extra - sum(part.nbytes for part in bits))
    source = torch.ones(min(COPY_ENTRIES, entries))
    target = torch.zeros_like(source)
    calls: Calls = {"top_mask": lambda: top_mask(scores, budget), "copy": lambda: target.copy_(source)}
    seconds = interleaved(calls, 3)
    middle = {name: median(values) for name, values in seconds.items()}
    ceiling = 2 * source.nbytes / middle["copy"] / 1e9
    rate = must_move(torch.float32, entries) / middle["top_mask"] / 1e9
    wrong = wrong_bits(scores, bits, budget)
    row = {
        "op": "top_mask",
        "case": f"10% of {entries} normal float32",
        "threads": options.threads,
        "milliseconds": f"{1e3 * middle['top_mask']:.1f}",
        "spread": f"{1e3 * min(seconds['top_mask']):.1f}-{1e3 * max(seconds['top_mask']):.1f}",
        "gb_per_s": f"{rate:.1f}",
        "copy_gb_per_s": f"{ceiling:.1f}",
        "of_copy": f"{rate / ceiling:.2f}",
        "extra MiB beyond bits": mebibytes(extra),
        "bits that differ from a sort": wrong,
    }
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    save(options.csv, [row])
    if wrong:
        raise SystemExit(f"{wrong} bits are wrong")


@pytest.mark.parametrize("case", CASES)
def bench_top_mask(benchmark, case):
    check()
    dtype, fraction = CASES[case]
    benchmark(top_mask, scores_of(dtype), int(fraction * ENTRIES))


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("top_mask")
    parser.add_argument("--billion", type=int, nargs="?", const=10**9, metavar="N", help="N scores, 1e9 without N")
    options = parser.parse_args(argv)
    if options.billion:
        large(options.billion, options)
    else:
        report("top_mask", {name: lambda case=case: prepare(*case) for name, case in CASES.items()}, check, options)


if __name__ == "__main__":
    main()
