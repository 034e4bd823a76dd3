r"""Accuracy, error bars, bytes and time of every compression, against exact inner products.

    python -m benchmarks.compression --data-root DIR

For every workload: all inner products exactly, once, and from them every method's scores for several numbers of retain
samples; then both sets sketched with every kind and size, and the same methods asked. Sizes are taken in an order that
leaves the less telling ones for last; what there was no time for is left out and named.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.compression.measures import Row
from benchmarks.compression.pictures import draw
from benchmarks.compression.results import drop_parts, provenance, read_part, write_all, write_part
from benchmarks.compression.settings import (
    LARGEST_DENSE,
    PROGRAM,
    RETAIN_COUNTS,
    SIZES,
    CompressionConfig,
    check,
)
from benchmarks.compression.study import Studied, reference_rows, sketch_rows, study_exactly
from benchmarks.compression.table import tables
from benchmarks.compression.timing import TIMED_SIZES, time_sketches, timed_pairs
from benchmarks.compression.workloads import Planned, load, model_name, parts_folder, planned, retain_counts
from benchmarks.end_to_end.workload import spread
from fillm.capture.sketching import DENSE
from fillm.config import run_command
from fillm.rank.gram_sources import sketch_sets

ALWAYS = 4096  # the size that is measured even if there is no time
PROBED = 4  # samples of a set that tell how long a dense kind takes
LARGEST_GROWTH = 1.5  # of what a kind took the last time, at most, at another size


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
    plans, out, made = planned(config), Path(config.out), provenance()
    rows, left, weights = [], 60.0 * config.minutes, sum(plan.weight for plan in plans)
    for plan in plans:
        path = parts_folder(config.out) / f"{plan.name}.parquet"
        found = read_part(path, config.measurement) if config.resume else None
        if found is None:
            begun = time.monotonic()
            found = measure(plan, config, left * plan.weight / weights)
            left -= time.monotonic() - begun
            write_part(path, found, config.measurement, made)
        else:
            _say(f"{plan.name}: measured before")
        weights -= plan.weight
        rows += found
    write_all(out, rows, made)
    draw(rows, out)
    drop_parts(parts_folder(config.out))
    print(tables(rows))
    return rows


def measure(plan: Planned, config: CompressionConfig, seconds: float) -> list[Row]:
    """One workload, in about so many seconds, the training of its model not counted."""
    say = lambda line: _say(f"{plan.name}: {line}")  # noqa: E731
    work, job = load(plan, config, say)
    deadline = time.monotonic() + seconds
    counts = retain_counts(len(job.retain), (5,) if config.quick else RETAIN_COUNTS)
    studied = study_exactly(work, job, counts)
    say(f"exact inner products of {len(job.scope)} tensors: {studied.seconds:.1f} s")
    rows = reference_rows(studied)
    sizes = config.chosen_sizes or SIZES
    if config.rounds:
        timed = [size for size in TIMED_SIZES if config.sizes is None or size in sizes] if not config.quick else sizes
        pairs = timed_pairs(config.chosen_kinds, timed) if timed else []
        rows += time_sketches(work, job, pairs, config.rounds, config.timed_samples, say)
    rows += _sketched(studied, config, sizes, deadline, say)
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
    return [about | row for row in rows]


def _sketched(
    studied: Studied, config: CompressionConfig, sizes: Sequence[int], deadline: float, say: Callable[[str], None]
) -> list[Row]:
    rows, took, left_out = [], {}, []
    for size in sizes:
        for kind in config.chosen_kinds:
            if kind in DENSE and size > LARGEST_DENSE:
                continue
            begun = time.monotonic()
            if config.chosen_sizes is None and (size != ALWAYS or kind in DENSE):
                expected = _dense_seconds(studied, kind, size) if kind in DENSE else LARGEST_GROWTH * took.get(kind, 0)
                if time.monotonic() + expected > deadline:
                    left_out.append(f"{kind} {size}")
                    continue
            rows += sketch_rows(studied, kind, size, say)
            took[kind] = time.monotonic() - begun
    if left_out:
        say(f"no time for {', '.join(left_out)}; give --minutes more")
    return rows


def _dense_seconds(studied: Studied, kind: str, size: int) -> float:
    """What both passes would take, from a few samples."""
    job = studied.job
    forget, retain = spread(job.forget, 1), spread(job.retain, PROBED)
    config = dataclasses.replace(job.config, compression=kind, sketch_dim=size)
    begun = time.monotonic()
    sketch_sets(dataclasses.replace(job, config=config, forget=forget, retain=retain))
    part = (len(forget) + len(retain)) / (len(job.forget) + len(job.retain))
    return (time.monotonic() - begun) / part


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
