"""One workload: exact scores once, then every kind and size of sketch beside them."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.compression.answers import (
    METHODS,
    WITHOUT_CROSS_TERMS,
    Answers,
    Ask,
    Scored,
    Source,
    ask_tensor,
    asks_for,
    collect,
    exact_source,
    published,
    sketched_source,
    storages,
    without_cross_terms,
)
from benchmarks.compression.measures import Row, cross_errors, cross_measures, score_measures
from benchmarks.end_to_end.workload import Workload
from fillm.rank.gram_answers import Answer
from fillm.rank.gram_passes import exact_grams
from fillm.rank.gram_sources import Sketched, sketch_sets
from fillm.rank.machine import free_memory
from fillm.rank.scoring import Job

PLAIN_TOKENS = 1024  # a batch, of the one plain run beside every pass; `timing` looks for the fastest
NORM_BYTES = 8  # of an exact squared norm
BYTES = {"float32": 4, "bfloat16": 2}
PUBLISHED = "soir, published"
INNER = "inner products"  # in the place of a method, in rows about the cross terms themselves


@dataclass
class Studied:
    """A workload with its exact answers.

    Attributes:
        counts: numbers of retain samples, rising, all of them the last.
        scored: exact scores by method and number of samples.
        sources: exact inner products by tensor.
        exact: exact answers.
        kept: answers from tensors so small that a sketch is the gradient itself, by tensor, storage and what is asked.
        seconds: of the exact passes and products.
    """

    work: Workload
    job: Job
    counts: list[int]
    scored: dict[Ask, Scored] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    exact: Answers = field(default_factory=Answers)
    kept: dict[tuple[str, str, Ask], Answer] = field(default_factory=dict)
    seconds: float = 0.0


def study_exactly(work: Workload, job: Job, counts: Sequence[int]) -> Studied:
    """The exact side: all inner products of all samples, and what every method makes of them."""
    found, begun = Studied(work, job, list(counts)), time.perf_counter()
    grams = {
        gram.name: gram for gram in exact_grams(job.passes, job.capture, job.forget, job.retain, free_memory() // 2)
    }
    found.seconds = time.perf_counter() - begun
    asks = asks_for(counts)
    for info in job.scope:
        found.sources[info.name] = exact_source(info, grams[info.name])
        collect(found.exact, ask_tensor(job, asks, found.sources[info.name]))
    found.scored = {ask: found.exact.scored(job, ask) for ask in asks}
    return found


def reference_rows(studied: Studied) -> list[Row]:
    """The exact scores themselves, and the row k = 0: lengths alone, where a method has an answer without products."""
    job, rows = studied.job, []
    none = np.zeros(len(job.scope), dtype=bool)
    numel = sum(info.numel for info in job.scope)
    bare = Answers()
    asks = asks_for(studied.counts, methods=WITHOUT_CROSS_TERMS)
    for info in job.scope:
        collect(bare, ask_tensor(job, asks, without_cross_terms(studied.sources[info.name])))
    for kind, answers, asked, size in (("exact", studied.exact, list(studied.scored), None), ("none", bare, asks, 0)):
        for ask in asked:
            measured = _measured(studied, answers, ask, none)
            per_sample = NORM_BYTES * len(job.scope) + (4 * numel if kind == "exact" else 0)
            base = {"kind": kind, "k": size, "storage": "float32", "store_bytes": ask[1] * per_sample}
            rows.append(base | measured | ({"pass_seconds": studied.seconds} if kind == "exact" else {}))
    return rows


def sketch_rows(studied: Studied, kind: str, size: int, plain_seconds: float, say: Callable[[str], None]) -> list[Row]:
    """Sketches both sets once, and asks every method for every number of samples and both storage types.

    Args:
        studied: the exact side.
        kind: of the sketches.
        size: `k`.
        plain_seconds: what plain forward + backward over both sets took.
        say: told how long it took.
    """
    config = dataclasses.replace(studied.job.config, compression=kind, sketch_dim=size)
    job = dataclasses.replace(studied.job, config=config)
    begun = time.perf_counter()
    sets = sketch_sets(job)
    seconds = time.perf_counter() - begun
    base: Row = {"kind": kind, "k": size, "pass_seconds": seconds, "pass_over_plain": seconds / plain_seconds}
    rows = []
    for storage, dtype in storages():
        found, cross = Answers(), {n: [] for n in studied.counts}
        asks = asks_for(studied.counts, size)
        for info in job.scope:
            whole = sets.maps[info.name].kind == "exact"
            known = {ask: studied.kept.get((info.name, storage, ask)) for ask in asks}
            if not (whole and all(known.values())):
                source = sketched_source(info, sets, dtype)
                known = ask_tensor(job, asks, source)
                for n in studied.counts if not whole else ():
                    pair = source(True, n).products, studied.sources[info.name](True, n).products
                    cross[n].append(cross_errors(*pair, sets.maps[info.name].dim))
            if whole:
                studied.kept |= {(info.name, storage, ask): one for ask, one in known.items()}
            collect(found, known)
        rows += [base | {"storage": storage} | row for row in _rows(studied, sets, found, cross, asks, storage)]
    rows += [base | {"storage": "float32"} | row for row in _published_rows(studied, job, sets)]
    say(f"{kind} {size}: passes {seconds:.1f} s, {seconds / plain_seconds:.2f} of plain; "
        f"all {time.perf_counter() - begun:.1f} s")  # fmt: skip
    return rows


def _rows(
    studied: Studied, sets: Sketched, found: Answers, cross: dict[int, list[Row]], asks: Sequence[Ask], storage: str
) -> list[Row]:
    sketched = np.array([sets.maps[info.name].kind != "exact" for info in studied.job.scope])
    numbers = sum(to.dim for to in sets.maps.values())
    per_sample = numbers * BYTES[storage] + NORM_BYTES * len(sets.maps)
    size = {n: {"store_bytes": n * per_sample, "sketched_tensors": int(sketched.sum())} for n in studied.counts}
    rows = [size[ask[1]] | _measured(studied, found, ask, sketched) for ask in asks]
    for n, tensors in cross.items():
        pairs = zip(found.of["soir", n], studied.exact.of["soir", n], strict=True)
        along = [(float(a.along[0]), float(b.along[0])) for (a, b), one in zip(pairs, sketched, strict=True) if one]
        rows.append(size[n] | {"method": INNER, "n": n} | cross_measures(tensors, along))
    return rows


def _published_rows(studied: Studied, job: Job, sets: Sketched) -> list[Row]:
    """Everything sketched, damping over the sketch's size; a method of its own, since no other is published."""
    none, rows = np.zeros(len(job.scope), dtype=bool), []
    for n in studied.counts:
        found = published(job, sets, n)
        row = {"method": PUBLISHED, "n": n} | score_measures(found, studied.scored["soir", n], none, ascending=False)
        rows.append(row)
    return rows


def _measured(studied: Studied, answers: Answers, ask: Ask, sketched: np.ndarray) -> Row:
    scored = answers.scored(studied.job, ask)
    ascending = "objective" in METHODS[ask[0]]
    return {"method": ask[0], "n": ask[1]} | score_measures(scored, studied.scored[ask], sketched, ascending)
