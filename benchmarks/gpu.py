r"""Everything that can only be learned on a GPU, in one command of a few minutes:

    python -m benchmarks.gpu --out benchmarks/results

First correctness: every op on fresh random inputs against its float64 reference; an op that is off gets no timing. Then
the machine's two ceilings and every op as a fraction of its floor. Last the ranking of a randomly initialised model of
Llama-3.2-1B's shape beside plain forward + backward. `--device cpu --shrink 64` tries the whole of it without a GPU.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from fillm_kernels import dispatch
from torch import Tensor

from benchmarks.end_to_end.results import commit
from benchmarks.gpu_ranking import ranking_rows
from benchmarks.kernels.gpu_cases import Case, cases

ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}  # accumulated in float32 either way
Row = dict[str, Any]


def seconds(call: Callable[[], Any], device: torch.device, rounds: int = 15) -> list[float]:
    """Seconds of a call in each round, by device events on a GPU, after two rounds of warm-up."""
    found = []
    for turn in range(rounds + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            taken = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
        if turn > 1:
            found.append(taken)
    return found


def ceilings(device: torch.device, shrink: int) -> dict[str, float]:
    """Bytes a second of a large copy (read plus written), FLOP/s of large products."""
    source = torch.randn((1 << 28) // shrink**2, device=device)
    target = torch.empty_like(source)
    copying = seconds(partial(target.copy_, source), device)
    found = {"bandwidth": 8.0 * source.numel() / median(copying)}
    del source, target
    size = 8192 // shrink
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(size, size, device=device).to(dtype)
        found[f"matrix {dtype}"] = 2.0 * size**3 / median(seconds(lambda a=a: a @ a, device))
    return found


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)] if isinstance(result, list | tuple) else []


def error_of(case: Case) -> float:
    """Largest `|out - ref| / |ref|` over what the op returns and writes; NaN if there is one."""
    given = case.inputs()
    wanted = deepcopy(given)
    got = [*tensors(case.run(**given)), *(given[name] for name in case.written)]
    with mock.patch.dict(os.environ, {dispatch.VARIABLE: "reference"}):
        want = [*tensors(case.run(**wanted)), *(wanted[name] for name in case.written)]
    errors = []
    for a, b in zip(got, want, strict=True):
        if not a.is_floating_point():
            errors.append(0.0 if torch.equal(a, b) else float("inf"))
            continue
        finite = b.double()
        errors.append(float((a.double() - finite).norm() / finite.norm().clamp(min=1e-300)))
    return float(torch.tensor(errors).max())


def measure(case: Case, ceiling: dict[str, float], device: torch.device) -> Row:
    """One row: error, time, fractions of the floor and of the library's call."""
    row: Row = {"op": case.op, "case": case.label, "backend": dispatch.backends()[case.op]["used"].get(device.type)}
    row["relative_error"] = error_of(case)
    narrow = "bfloat16" in case.label
    allowed = ERROR[torch.bfloat16 if narrow else torch.float32] * 10
    if not row["relative_error"] <= allowed:
        return {**row, "verdict": f"WRONG: over {allowed:.0e}; not timed"}
    given = case.inputs()
    own = seconds(lambda: case.run(**given), device)
    rate = ceiling["matrix torch.bfloat16" if narrow else "matrix torch.float32"]
    floor = max(case.flop / rate if rate else 0.0, case.bytes / ceiling["bandwidth"])
    row |= {
        "milliseconds": 1e3 * median(own),
        "milliseconds_min": 1e3 * min(own),
        "milliseconds_max": 1e3 * max(own),
        "gflops": case.flop / median(own) / 1e9,
        "gigabytes_per_second": case.bytes / median(own) / 1e9,
        "of_floor": floor / median(own),
    }
    reached = floor / median(own)
    if case.library:
        name, call = case.library
        beside = median(seconds(lambda: call(given), device))
        row |= {"library": name, "library_over_op": beside / median(own)}
        reached = beside / median(own) if case.bound == "ratio" else reached
    return {**row, "target": case.target, "verdict": "reached" if reached >= case.target else "below target"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if an op is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_ops.csv and gpu_rank.csv")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides widths and counts, to try it without a GPU")
    parser.add_argument("--only", default="", help="comma-separated ops, or rank")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shrink 64 tries it without one")
    if options.shrink < 1:
        parser.error("--shrink must be at least 1")
    device, wanted = torch.device(options.device), {name for name in options.only.split(",") if name}
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    ceiling = ceilings(device, options.shrink)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        **{f"ceiling {name}": value for name, value in ceiling.items()},
    }
    print("  ".join(f"{name}: {value / 1e9:,.0f} G/s" for name, value in ceiling.items()), flush=True)
    rows = []
    for case in cases(device, options.shrink):
        if wanted and case.op not in wanted:
            continue
        rows.append(measure(case, ceiling, device))
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in rows[-1].items()}
        print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    if rows:
        write(options.out / "gpu_ops.csv", [{**row, **machine} for row in rows])
    if not wanted or "rank" in wanted:
        ranked = ranking_rows(device, options.shrink)
        for row in ranked:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        write(options.out / "gpu_rank.csv", [{**row, **machine} for row in ranked])
    return int(any(row["verdict"].startswith("WRONG") for row in rows))


def write(path: Path, rows: Sequence[Row]) -> None:
    """A CSV with every column that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
