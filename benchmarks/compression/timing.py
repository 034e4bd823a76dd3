"""Seconds of the passes that sketch both sets, beside plain forward + backward, in rounds.

A, B, C, A, B, C, ...: a busy moment of the machine hits all alike, and ratios are taken within a round.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.compression.measures import Row
from benchmarks.compression.settings import LARGEST_DENSE, SIZES
from benchmarks.end_to_end.results import spread_of
from benchmarks.end_to_end.variants import PLAIN_BUDGETS, plain
from benchmarks.end_to_end.workload import Workload, spread
from fillm.capture.sketching import DENSE
from fillm.rank.gram_sources import sketch_sets
from fillm.rank.scoring import Job

TIMED_SIZES = tuple(sorted(SIZES))


def time_sketches(
    work: Workload,
    job: Job,
    pairs: Sequence[tuple[str, int]],
    rounds: int,
    num_samples: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Rows with `kind`, `k`, seconds a sample and the ratio to plain, each with its spread over the rounds.

    Args:
        work: of the model and both sets.
        job: of the same, to run passes with.
        pairs: kinds and sizes.
        rounds: after one of warm-up.
        num_samples: of both sets together; they have the lengths of all.
        say: told of every round.
    """
    part = min(1.0, num_samples / (len(job.forget) + len(job.retain)))
    forget, retain = (spread(some, max(1, round(part * len(some)))) for some in (job.forget, job.retain))
    few, count = dataclasses.replace(work, forget=forget, retain=retain), len(forget) + len(retain)
    runs: dict[tuple[str, int], Callable[[], object]] = {
        ("plain", budget): (lambda budget=budget: plain(few, budget)) for budget in PLAIN_BUDGETS
    }
    for kind, size in pairs:
        config = dataclasses.replace(job.config, compression=kind, sketch_dim=size)
        one = dataclasses.replace(job, config=config, forget=forget, retain=retain)
        runs[kind, size] = lambda one=one: sketch_sets(one)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for round_ in range(1 + rounds):
        for key, run in runs.items():
            begun = time.perf_counter()
            run()
            if round_:
                seconds[key].append((time.perf_counter() - begun) / count)
        say(f"timing, round {round_} of {rounds} on {count} samples" if round_ else "timing: warm-up done")
    baseline = min((key for key in runs if key[0] == "plain"), key=lambda key: median(seconds[key]))
    rows = []
    for (kind, size), own in seconds.items():
        over = [a / b for a, b in zip(own, seconds[baseline], strict=True)]
        row = {"kind": kind, "k": size, "method": "timing", "timed_samples": count, "rounds": rounds}
        rows.append(row | spread_of("seconds_per_sample", own) | spread_of("over_plain", over))
    return rows


def timed_pairs(kinds: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, int]]:
    """What is timed in rounds: every kind at every size it is measured at."""
    return [(kind, size) for size in sizes for kind in kinds if kind not in DENSE or size <= LARGEST_DENSE]
