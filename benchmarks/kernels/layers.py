"""Layer shapes the ops are timed on, and the machine's ceiling to time them against.

Run from the root of the checkout; every module prints its table with median and spread:

    python -m benchmarks.kernels.bench_ghost_norm [--threads N] [--csv FILE]

The same layers run under pytest-benchmark with `make bench`. Ratios compare medians of the same run: every round calls
everything once, one after the other, so that a busy moment of the machine hits all alike. One round is warm-up.
Extra MiB are what one further call of each had resident at most beyond what was there before, its result included.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.kernels.memory import extra_bytes, mebibytes
from benchmarks.kernels.rows import save

CEILING_SIZE = 1024  # the ceiling is an IEEE float32 product of two square matrices of this size
COPY_ENTRIES = 1 << 26  # float32: 256 MiB, well past any cache


@dataclass(frozen=True)
class Layer:
    """B samples of T tokens at a linear layer from I to O features; `zero` of the rows of dy are zero."""

    tokens: int
    samples: int
    inputs: int
    outputs: int
    zero: float = 0.0

    def __str__(self) -> str:
        """As it appears in tables."""
        half = f" zero={self.zero}" if self.zero else ""
        return f"T={self.tokens} B={self.samples} I={self.inputs} O={self.outputs}{half}"

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Random x [N, I] and dy [N, O], offsets [B + 1]."""
        generator = torch.Generator().manual_seed(0)
        rows = self.tokens * self.samples
        x = torch.randn(rows, self.inputs, generator=generator).to(dtype)
        dy = torch.randn(rows, self.outputs, generator=generator).to(dtype)
        dy.view(self.samples, self.tokens, -1)[:, : int(self.zero * self.tokens)] = 0
        return x, dy, torch.arange(self.samples + 1) * self.tokens


LAYERS = (
    Layer(60, 16, 256, 256),
    Layer(60, 16, 256, 688),
    Layer(60, 16, 256, 4096),
    Layer(60, 16, 256, 4096, zero=0.5),
    Layer(32, 32, 1024, 1024),
    Layer(64, 32, 1024, 1024),
    Layer(128, 32, 1024, 1024),
)
Calls = Mapping[str, Callable[[], object]]


def interleaved(calls: Calls, rounds: int = 15) -> dict[str, list[float]]:
    """Seconds of every call in every round, A A B B C C, ..., the second of each pair, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            call()  # untimed, so that each finds its operands in cache as a layer that just made them leaves them
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(
    title: str,
    prepare: Callable[..., tuple[Calls, float]],
    check: Callable[[], None],
    argv: Sequence[str] | None = None,
    kinds: Sequence[str] = (),
    moved: Callable[..., float] | None = None,
) -> None:
    """Check the op, then print (and with `--csv` save) a row per layer, or per layer and kind.

    Args:
        title: the op.
        prepare: layer (and kind) -> calls by name, the op's own first, and the FLOP the op's algorithm needs.
        check: raises if the op is wrong; nothing is timed then.
        argv: of the command line; None for the process's own.
        kinds: what `prepare` also takes, if anything.
        moved: layer (and kind) -> bytes that must move; with it GB/s beside those of a copy.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    check()
    a = torch.randn(CEILING_SIZE, CEILING_SIZE)
    source = torch.ones(COPY_ENTRIES)
    target = torch.zeros_like(source)
    ceilings: Calls = {"ceiling": lambda: a @ a}
    if moved is not None:
        ceilings = {**ceilings, "copy": lambda: target.copy_(source)}
    rows = []
    for which in [(layer, *kind) for layer in LAYERS for kind in ([(kind,) for kind in kinds] or [()])]:
        calls, flop = prepare(*which)
        seconds = interleaved({**calls, **ceilings})
        middle = {name: median(values) for name, values in seconds.items()}
        own = next(iter(calls))
        ceiling = 2 * CEILING_SIZE**3 / middle["ceiling"] / 1e9
        row = {
            "op": title,
            "layer": " ".join(map(str, which)),
            "threads": options.threads,
            "milliseconds": f"{1e3 * middle[own]:.3f}",
            "spread": f"{1e3 * min(seconds[own]):.3f}-{1e3 * max(seconds[own]):.3f}",
            "gflops": f"{flop / middle[own] / 1e9:.1f}",
            "ceiling_gflops": f"{ceiling:.1f}",
        }
        if moved is not None:
            row["gb_per_s"] = f"{moved(*which) / middle[own] / 1e9:.2f}"
            row["copy_gb_per_s"] = f"{2 * source.nbytes / middle['copy'] / 1e9:.1f}"
        row |= {f"{name} / op": f"{middle[name] / middle[own]:.2f}" for name in calls if name != own}
        row |= {f"{name} extra MiB": mebibytes(extra_bytes(call)) for name, call in calls.items()}
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "op"), flush=True)
    save(options.csv, rows)
