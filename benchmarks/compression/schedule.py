"""Which kinds and sizes of sketches there is time for."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from benchmarks.compression.measures import Row
from benchmarks.compression.settings import LARGEST_DENSE, SIZES, CompressionConfig
from benchmarks.compression.study import PLAIN_TOKENS, Studied, sketch_rows
from benchmarks.end_to_end.variants import plain
from benchmarks.end_to_end.workload import spread
from fillm.capture.sketching import DENSE
from fillm.data import plan_batches
from fillm.rank.gram_sources import sketch_sets

ALWAYS = 4096  # the size that is measured even if there is no time
PROBED_SIZE = 64  # that tells how long a dense kind takes: in proportion to its size and the number of batches
GROWTH = 1.5  # what another size takes, at most, of what this one took; dense kinds aside


Pair = tuple[str, int]  # kind and size


def missing(config: CompressionConfig, before: Sequence[Row]) -> list[Pair]:
    """The kinds and sizes that the settings want and rows do not have, in the order that they are to be measured in."""
    sizes = config.chosen_sizes or SIZES
    wanted = [(kind, size) for size in sizes for kind in config.chosen_kinds]
    there = {(row["kind"], row["k"]) for row in before if row["method"] != "timing"}
    return [pair for pair in wanted if pair not in there and not (pair[0] in DENSE and pair[1] > LARGEST_DENSE)]


def rows_in_time(
    studied: Studied,
    config: CompressionConfig,
    pairs: Sequence[Pair],
    deadline: float,
    say: Callable[[str], None],
    add: Callable[[list[Row]], None],
) -> None:
    """The rows of kinds and sizes, one after another, of those that should be done before a deadline.

    Sizes that were asked for are all measured; else `ALWAYS` is, and what is left out is said.

    Args:
        studied: the workload.
        config: the settings.
        pairs: kinds and sizes.
        deadline: by `time.monotonic`.
        say: told what is measured, and at the end what there was no time for.
        add: given the rows of every pair as soon as they are there.
    """
    took: dict[str, tuple[int, float]] = {}
    left_out: dict[int, list[str]] = {}
    plain_seconds: dict[int, float] = {}
    for kind, size in pairs:
        free = config.chosen_sizes is None and (size != ALWAYS or kind in DENSE)
        if free and time.monotonic() + _expected(studied, kind, size, took) > deadline:
            left_out.setdefault(size, []).append(kind)
            continue
        if size not in plain_seconds:  # once a size, near in time to what is compared with it
            plain_seconds[size] = _plain_seconds(studied)
        begun = time.monotonic()
        add(sketch_rows(studied, kind, size, plain_seconds[size], say))
        took[kind] = size, time.monotonic() - begun
    if left_out:
        some = [f"{size} ({', '.join(kinds)})" for size, kinds in sorted(left_out.items())]
        say(f"no time for {', '.join(some)}; --resume with --minutes goes on with them")


def _plain_seconds(studied: Studied) -> float:
    """Of plain forward + backward over both sets."""
    begun = time.perf_counter()
    plain(studied.work, PLAIN_TOKENS)
    return time.perf_counter() - begun


def _expected(studied: Studied, kind: str, size: int, took: dict[str, tuple[int, float]]) -> float:
    if kind not in DENSE:
        return GROWTH * took.get(kind, (size, 0.0))[1]
    if kind not in took:
        took[kind] = PROBED_SIZE, _dense_seconds(studied, kind, PROBED_SIZE)
    measured, seconds = took[kind]
    return seconds * size / measured


def _dense_seconds(studied: Studied, kind: str, size: int) -> float:
    """What the passes of a dense kind would take, from one sample of either set: every batch makes the map anew."""
    job = studied.job
    forget, retain = spread(job.forget, 1), spread(job.retain, 1)
    config = dataclasses.replace(job.config, compression=kind, sketch_dim=size)
    begun = time.monotonic()
    sketch_sets(dataclasses.replace(job, config=config, forget=forget, retain=retain))
    batches = sum(len(plan_batches(some.lengths)) for some in (job.forget, job.retain))
    return (time.monotonic() - begun) * batches / 2
