r"""Everything that can only be learned on a GPU, in one command of under ten minutes:

    python -m benchmarks.gpu --out benchmarks/results

First correctness: every op, element type and odd shape on fresh random inputs beside its float64 reference
(gpu_correct.csv); an op that is off anywhere gets no timing. Then the machine's two ceilings and every op as a fraction
of its floor (gpu_ops.csv), public projections beside `sketch` (gpu_peers.csv), and last rankings of randomly
initialised models of Llama-3.2-1B's and, if memory allows, Llama-3.1-8B's shape, exact and from sketches, and a step of
unlearning inside a mask, beside plain forward + backward (gpu_rank.csv). What does not fit in `--minutes` or in memory
is a row that says so. `--device cpu --shrink 64` tries the whole of it without a GPU.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import fillm_kernels as fk
import torch

from benchmarks.gpu_ranking import ranking_rows
from benchmarks.kernels.gpu_calls import Call, Case, backend_of, excess_of, name_of
from benchmarks.kernels.gpu_cases import cases
from benchmarks.kernels.gpu_checks import checks
from benchmarks.kernels.gpu_peers import peer_rows
from benchmarks.kernels.gpu_timing import Clock, ceilings, machine, seconds, under_load

# The share of the time that is gone when a stage begins no further case.
CHECKS_END, TIMINGS_END, PEERS_END = 0.45, 0.72, 0.78
Row = dict[str, Any]


class Table:
    """A CSV that is whole after every row, so that a run cut short leaves what it found."""

    def __init__(self, path: Path, made: Row) -> None:
        self.rows: list[Row] = []
        self._path, self._made = path, dict(made)

    def also(self, made: Row) -> None:
        """Columns for every row, those of now and those to come."""
        self._made |= made

    def add(self, row: Row) -> None:
        """Prints a row, and writes the file anew with every column that any row has, the machine's last."""
        row = {**row, "verdict": row.pop("verdict")}
        self.rows.append(row)
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
        print("  ".join(f"{key} {value}" for key, value in shown.items() if value != ""), flush=True)
        columns = [*dict.fromkeys(chain(*self.rows)), *self._made]
        with self._path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows({**row, **self._made} for row in self.rows)

    def failed(self) -> bool:
        """Whether a row says that something is wrong, or broke."""
        return any(str(row["verdict"]).startswith(("WRONG", "FAILED")) for row in self.rows)


def guarded(row: Row, work: Callable[[], Row]) -> Row:
    """What `work` found, or why it found nothing: one case that breaks does not end the run."""
    try:
        return {**row, **work()}
    except torch.OutOfMemoryError as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {**row, "verdict": f"left out: out of memory: {_one_line(error)}"}
    except fk.BackendError as error:  # FILLM_BACKEND asks for what the op does not have, or for what was found wrong
        found = "FAILED" if "self-check" in str(error) else "left out"
        return {**row, "verdict": f"{found}: {_one_line(error)}"}
    except Exception as error:  # whatever a compiler or a driver raises
        return {**row, "verdict": f"FAILED: {type(error).__name__}: {_one_line(error)}"}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def heading(call: Call) -> Row:
    """What a row is about."""
    return {"op": call.op, "case": call.label, "dtype": name_of(call.dtype)}


def correctness(call: Call, device: torch.device) -> Row:
    """One row: error beside the float64 reference and what it may be."""
    error, allowed = excess_of(call)
    verdict = "right" if error <= allowed else f"WRONG: off by {error:.1e}, {allowed:.0e} allowed"
    return {**backend_of(call.op, device), "relative_error": error, "allowed": allowed, "verdict": verdict}


def measure(case: Case, reduced: Case, ceiling: dict[str, float], device: torch.device) -> Row:
    """One row: errors at reduced and at full size, then time, fraction of the floor and ratios to torch's calls."""
    row = correctness(reduced, device)
    given = case.inputs()
    row["spot_error"] = spot = case.spot(given)
    if row["verdict"] == "right" and not spot <= case.allowed:
        row["verdict"] = f"WRONG: off by {spot:.1e} at full size, {case.allowed:.0e} allowed"
    if row["verdict"] != "right":
        return {**row, "verdict": f"{row['verdict']}; not timed"}
    own = seconds(lambda: case.run(**given), device)
    rate = ceiling["matrix torch.float32" if case.dtype == torch.float32 else "matrix torch.bfloat16"]
    floor = max(case.flop / rate, case.bytes / ceiling["bandwidth"])
    of_floor = floor / median(own)
    row |= {
        "milliseconds": 1e3 * median(own),
        "milliseconds_min": 1e3 * min(own),
        "milliseconds_max": 1e3 * max(own),
        "gflops": case.flop / median(own) / 1e9,
        "gigabytes_per_second": case.bytes / median(own) / 1e9,
        "floor_milliseconds": 1e3 * floor,
        "of_floor": of_floor,
        "floor_target": "" if case.target is None else case.target,
    }
    targets = [] if case.target is None else [of_floor >= case.target]
    for other in case.beside:
        ratio = median(seconds(lambda other=other: other.call(given), device)) / median(own)
        row[f"{other.name} / op"] = ratio
        if other.target is not None:
            row[f"{other.name} / op target"] = other.target
            targets.append(ratio >= other.target)
    verdict = "no target" if not targets else "reached" if all(targets) else "below target"
    return {**row, "verdict": verdict}


def check_all(table: Table, calls: Iterable[Call], clock: Clock, device: torch.device) -> set[str]:
    """The stage of correctness; the ops of which some row is red."""
    for call in calls:
        if clock.left(CHECKS_END) <= 0:
            table.add({**heading(call), "verdict": "left out: time"})
            continue
        table.add(guarded(heading(call), partial(correctness, call, device)))
    return {row["op"] for row in table.rows if row["verdict"].startswith(("WRONG", "FAILED"))}


def time_all(
    table: Table, pairs: Iterable[tuple[Case, Case]], red: set[str], clock: Clock, shrink: int, device: torch.device
) -> None:
    """The stage of timings, on its own ceilings."""
    ceiling = ceilings(device, shrink)
    found = {**{f"ceiling {name}": value for name, value in ceiling.items()}, **under_load(device)}
    print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    table.also(found)
    for case, reduced in pairs:
        if case.op in red:
            table.add({**heading(case), "verdict": "not timed: wrong in gpu_correct.csv"})
        elif clock.left(TIMINGS_END) <= 0:
            table.add({**heading(case), "verdict": "left out: time"})
        else:
            work = partial(measure, case, reduced, ceiling, device)
            table.add(guarded(heading(case), work))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if an op is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_{correct,ops,peers,rank}.csv")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides widths and counts, to try it without a GPU")
    parser.add_argument("--only", default="", help="comma-separated ops, peers, rank")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing that would end much later")
    parser.add_argument("--seed", type=int, help="of the inputs; fresh ones at every run without")
    options = parser.parse_args(argv)
    wanted = {name for name in options.only.split(",") if name}
    known = [*fk.backends(), "outer_sketch", "peers", "rank"]
    if unknown := wanted - set(known):
        parser.error(f"--only {', '.join(sorted(unknown))}: not among {', '.join(known)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shrink 64 tries it without one")
    if options.shrink < 1:
        parser.error("--shrink must be at least 1")
    clock, device = Clock(options.minutes), torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    options.out.mkdir(parents=True, exist_ok=True)
    seed = torch.seed() % 2**31 if options.seed is None else options.seed
    torch.manual_seed(seed)
    made = {"seed": seed, **machine(device)}
    tables = {name: Table(options.out / f"gpu_{name}.csv", made) for name in ("correct", "ops", "peers", "rank")}

    def asked(name: str) -> bool:
        return not wanted or name in wanted

    if calls := [call for call in checks(device, options.shrink > 1) if asked(call.op)]:
        red = check_all(tables["correct"], calls, clock, device)
        both = zip(cases(device, options.shrink), cases(device, options.shrink, reduced=True), strict=True)
        pairs = (pair for pair in both if asked(pair[0].op))
        time_all(tables["ops"], pairs, red, clock, options.shrink, device)
    if asked("peers"):
        for row in peer_rows(device, options.shrink, clock, PEERS_END):
            tables["peers"].add(row)
    if asked("rank"):
        for row in ranking_rows(device, options.shrink, clock):
            tables["rank"].add(row)
    print(f"{60 * options.minutes - clock.left():.0f} seconds; {options.out}", flush=True)
    return int(any(table.failed() for table in tables.values()))


if __name__ == "__main__":
    sys.exit(main())
