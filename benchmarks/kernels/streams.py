"""Ops that should run at the speed of memory, timed beside a copy of the same machine in the same run.

    python -m benchmarks.kernels.bench_top_mask [--threads N] [--rounds N] [--csv FILE]

GB/s count the bytes an op must move at least (given by each module), not those it does move.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.layers import COPY_ENTRIES, Calls, interleaved
from benchmarks.kernels.memory import extra_bytes, mebibytes
from benchmarks.kernels.rows import save


def parser_of(title: str) -> argparse.ArgumentParser:
    """The options that every such benchmark has."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    return parser


def report(
    title: str,
    cases: Mapping[str, Callable[[], tuple[Calls, float]]],
    check: Callable[[], None],
    options: argparse.Namespace,
) -> None:
    """Check the op, then print (and with `--csv` save) a row per case.

    Args:
        title: the op.
        cases: by name, what makes the calls by name, the op's own first, and the bytes it must move.
        check: raises if the op is wrong; nothing is timed then.
        options: what `parser_of(title)` read.
    """
    torch.set_num_threads(options.threads)
    check()
    source = torch.ones(COPY_ENTRIES)
    target = torch.zeros_like(source)
    rows: list[dict[str, Any]] = []
    for name, prepare in cases.items():
        calls, size = prepare()
        seconds = interleaved({**calls, "copy": lambda: target.copy_(source)}, options.rounds)
        middle = {call: median(values) for call, values in seconds.items()}
        own = next(iter(calls))
        ceiling = 2 * source.nbytes / middle["copy"] / 1e9
        row = {
            "op": title,
            "case": name,
            "threads": options.threads,
            "milliseconds": f"{1e3 * middle[own]:.3f}",
            "spread": f"{1e3 * min(seconds[own]):.3f}-{1e3 * max(seconds[own]):.3f}",
            "gb_per_s": f"{size / middle[own] / 1e9:.1f}",
            "copy_gb_per_s": f"{ceiling:.1f}",
            "of_copy": f"{size / middle[own] / 1e9 / ceiling:.2f}",
        }
        row |= {f"{call} extra MiB": mebibytes(extra_bytes(run)) for call, run in calls.items()}
        row["baseline / op"] = ", ".join(f"{call} {middle[call] / middle[own]:.2f}" for call in calls if call != own)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "op"), flush=True)
    save(options.csv, rows)
