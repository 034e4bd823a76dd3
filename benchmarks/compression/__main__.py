r"""Accuracy, error bars, bytes and time of every compression, against exact inner products.

    python -m benchmarks.compression --data-root DIR

For every workload: all inner products exactly, once, and from them every method's scores for several numbers of retain
samples; then both sets sketched with every kind and size, and the same methods asked. Sizes are taken in an order that
leaves the less telling ones for last; what there was no time for is left out and named.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.compression.measures import Row
from benchmarks.compression.pictures import draw
from benchmarks.compression.results import drop_parts, make_folder, provenance, read_rows, write_all, write_part
from benchmarks.compression.schedule import missing, rows_in_time
from benchmarks.compression.settings import (
    PROGRAM,
    RETAIN_COUNTS,
    SIZES,
    CompressionConfig,
    check,
)
from benchmarks.compression.study import reference_rows, study_exactly
from benchmarks.compression.table import tables
from benchmarks.compression.timing import TIMED_SIZES, time_sketches, timed_pairs
from benchmarks.compression.workloads import Planned, load, model_name, parts_folder, planned, retain_counts
from fillm.config import run_command


def bench(config: CompressionConfig) -> list[Row]:
    """The command: measures, prints, writes the files.

    Returns:
        All rows.

    Raises:
        UsageError: a setting out of range, or `--out` cannot be written.
        FillmError: as loading models and data does.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    plans, out, made = planned(config), Path(config.out), provenance(config)
    make_folder(parts_folder(config.out))
    rows, left, weights = [], 60.0 * config.minutes, sum(plan.weight for plan in plans)
    for plan in plans:
        path = parts_folder(config.out) / f"{plan.name}.parquet"
        before = _measured_before(config, plan.name) if config.resume else []

        def save(found: list[Row], path: Path = path) -> None:
            write_part(path, found, config.measurement, made)

        if before and not missing(config, before):
            _say(f"{plan.name}: measured before")
            found, took = before, 0.0
        else:
            found, took = measure(plan, config, left * plan.weight / weights, plan is plans[0], before, save)
        save(found)
        left, weights = left - took, weights - plan.weight
        rows += found
    write_all(out, rows, config.measurement, made)
    draw(rows, out)
    drop_parts(parts_folder(config.out))
    print(tables(rows))
    return rows


def measure(
    plan: Planned,
    config: CompressionConfig,
    seconds: float,
    timed: bool,
    before: list[Row],
    save: Callable[[list[Row]], None],
) -> tuple[list[Row], float]:
    """One workload, in about so many seconds.

    Args:
        plan: the workload.
        config: the settings.
        seconds: what it may take; the training of its model is not counted.
        timed: whether passes are timed in rounds beside plain forward + backward.
        before: the rows of an earlier run of it with the same settings, which are kept; empty for none.
        save: given all its rows whenever there are more.

    Returns:
        Its rows, and the seconds it took.
    """

    def say(line: str) -> None:
        _say(f"{plan.name}: {line}")

    work, job = load(plan, config, say)
    about = {
        "workload": plan.name,
        "model": model_name(work),
        "forget": Path(plan.forget).name,
        "retain": Path(plan.retain).name,
        "model_parameters": sum(info.numel for info in job.scope),
        "model_tensors": len(job.scope),
        "forget_samples": len(job.forget),
        "retain_samples": len(job.retain),
    }
    begun, rows = time.monotonic(), list(before)

    def add(more: list[Row]) -> None:
        rows.extend(about | row for row in more)
        save(rows)

    counts = retain_counts(len(job.retain), (5,) if config.quick else RETAIN_COUNTS)
    studied = study_exactly(work, job, counts)
    say(f"exact inner products of {len(job.scope)} tensors: {studied.seconds:.1f} s")
    if not before:
        first = reference_rows(studied)
        sizes = config.chosen_sizes or SIZES
        if config.rounds and timed:
            chosen = [size for size in TIMED_SIZES if config.sizes is None or size in sizes]
            pairs = timed_pairs(config.chosen_kinds, sizes if config.quick else chosen)
            first += time_sketches(work, job, pairs, config.rounds, config.timed_samples, say)
        add(first)
    rows_in_time(studied, config, missing(config, before), begun + seconds, say, add)
    return rows, time.monotonic() - begun


def _measured_before(config: CompressionConfig, workload: str) -> list[Row]:
    """The rows of a workload by an earlier run with the same settings, stopped or whole."""
    found = read_rows(parts_folder(config.out) / f"{workload}.parquet", config.measurement)
    found = found or read_rows(Path(config.out) / "compression.parquet", config.measurement)
    return [row for row in found if row["workload"] == workload]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `CompressionConfig`.

    Returns:
        The exit code: 0 done, 2 wrong use or bad input.
    """

    def run(config: CompressionConfig) -> None:
        bench(config)

    return run_command(CompressionConfig, run, argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
