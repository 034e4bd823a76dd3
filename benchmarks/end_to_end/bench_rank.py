r"""The ranking beside plain forward + backward and the published pipeline: time, memory, accuracy, in one run.

    python -m benchmarks.end_to_end.bench_rank --data-root DIR \
        --forget 'tofu:full[3960:]' --retain 'tofu:full[3600:3960]'

After a round of warm-up, every round runs everything once, one after the other, so that a busy moment of the machine
hits all alike; ratios are taken within a round. The baseline is the token budget at which plain forward + backward is
fastest. The pipelines that keep every gradient run on a few samples with the lengths of all, and are compared per
sample; their errors are to the float64 scores of those few samples.
"""

import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.end_to_end import peak_memory
from benchmarks.end_to_end.exact import exact_scores, largest_relative_error, spearman
from benchmarks.end_to_end.results import Row, provenance, spread_of, table, write_csv
from benchmarks.end_to_end.settings import PROGRAM, BenchConfig, check
from benchmarks.end_to_end.variants import CERTIFIED, Outcome, Variant, variants
from benchmarks.end_to_end.workload import Workload, load_workload, resolve
from fillm.config import run_command

MEMORY_RETAIN = (60, 360)  # retain samples between which the peak of a certified ranking should not grow
BOUND_SLACK = 1e-6  # relative; what the float64 reference itself is worth, see exact_scores


def interleave(
    found: Sequence[Variant], repeats: int, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, Outcome]]:
    """Runs everything `1 + repeats` times, A B C, A B C, ...; the first round is the warm-up and is not timed.

    Returns:
        Seconds a sample of every variant and round; what each came to in the last round.
    """
    seconds: dict[str, list[float]] = {variant.key: [] for variant in found}
    outcomes: dict[str, Outcome] = {}
    for round_ in range(1 + repeats):
        for variant in found:
            gc.collect()
            begun = time.perf_counter()
            outcomes[variant.key] = variant.run()
            taken = (time.perf_counter() - begun) / variant.num_samples
            if round_:
                seconds[variant.key].append(taken)
        times = ", ".join(f"{key} {1e3 * taken[-1]:.1f} ms" for key, taken in seconds.items() if taken)
        say(f"round {round_} of {repeats}: {times}" if round_ else "warm-up done")
    return seconds, outcomes


def timing_rows(found: Sequence[Variant], seconds: dict[str, list[float]], outcomes: dict[str, Outcome]) -> list[Row]:
    """A row per variant; ratios are medians of the ratios within each round."""
    plain = [variant.key for variant in found if variant.key.startswith("plain")]
    baseline = min(plain, key=lambda key: median(seconds[key]))
    rows = []
    for variant in found:
        own = seconds[variant.key]
        row: Row = {
            "key": variant.key,
            "what": variant.what,
            "baseline": "yes" if variant.key == baseline else "",
            "forget_samples": len(variant.forget),
            "retain_samples": len(variant.retain),
            "tokens": variant.num_tokens,
            "tokens_per_batch": variant.tokens_per_batch or "",
            "repeats": len(own),
            **spread_of("seconds_per_sample", own),
            "tokens_per_second": variant.num_tokens / variant.num_samples / median(own),
            "note": outcomes[variant.key].note,
        }
        for name, other in (("over_plain", baseline), ("over_certified", CERTIFIED)):
            row |= spread_of(name, [a / b for a, b in zip(own, seconds[other], strict=True)])
        rows.append(row)
    return rows


def add_accuracy(
    rows: Sequence[Row], found: Sequence[Variant], outcomes: dict[str, Outcome], work: Workload, damping: float
) -> None:
    """Compares the scores of every variant with float64 on the variant's own samples."""
    references: dict[tuple[str, str], dict[str, float]] = {}
    for row, variant in zip(rows, found, strict=True):
        outcome = outcomes[variant.key]
        if not outcome.scores:
            continue
        data = (variant.forget.fingerprint, variant.retain.fingerprint)
        if data not in references:
            references[data] = exact_scores(work.model, variant.forget, variant.retain, damping)
        exact = references[data]
        row["largest_relative_error"] = largest_relative_error(outcome.scores, exact)
        row["spearman"] = spearman(outcome.scores, exact)
        intervals = {name: (low, high) for name, (low, high) in outcome.bounds.items() if low < high}
        if intervals:
            row["outside_bounds"] = sum(not _holds(bounds, exact[name]) for name, bounds in intervals.items())


def _holds(bounds: tuple[float, float], exact: float) -> bool:
    return bounds[0] * (1.0 - BOUND_SLACK) <= exact <= bounds[1] * (1.0 + BOUND_SLACK)


def memory_rows(rows: Sequence[Row], config: BenchConfig, work: Workload, say: Callable[[str], None]) -> list[Row]:
    """Adds peak memory to every row; further rows: certified SOIR with few and with many retain samples."""
    for row in rows:
        row |= _memory([_measured(config, row["key"], None, say)])
    few, many = MEMORY_RETAIN
    if len(work.retain) < many:
        few, many = max(1, len(work.retain) // 6), len(work.retain)
    # In turn and several times: what the allocator keeps differs by some per cent from process to process.
    found: dict[int, list[peak_memory.Memory]] = {few: [], many: []}
    for _ in range(config.repeats):
        for count, memories in found.items():
            memories.append(_measured(config, CERTIFIED, count, say))
    return [
        {
            "key": f"memory-{count}",
            "what": f"certified SOIR, {count} retain samples",
            "forget_samples": len(work.forget),
            "retain_samples": count,
            "repeats": config.repeats,
            **_memory(memories),
            "note": "memory only",
        }
        for count, memories in found.items()
    ]


def _measured(config: BenchConfig, key: str, num_retain: int | None, say: Callable[[str], None]) -> peak_memory.Memory:
    found = peak_memory.measure(config, key, num_retain)
    say(f"peak memory of {key}: {found.peak / 2**20:.0f} MiB")
    return found


def _memory(found: Sequence[peak_memory.Memory]) -> Row:
    """Columns of a row: medians, and the least and largest peak."""
    peaks, loaded = [memory.peak for memory in found], median(memory.loaded for memory in found)
    return {
        "peak_bytes": int(median(peaks)),
        "peak_bytes_min": min(peaks),
        "peak_bytes_max": max(peaks),
        "loaded_bytes": int(loaded),
        "peak_over_loaded_bytes": int(median(peaks) - loaded),
    }


def explain(rows: Sequence[Row], found: Sequence[Variant], more: Sequence[Row]) -> list[str]:
    """What the table says, one line a variant."""
    baseline = next(row for row in rows if row["baseline"])
    lines = [f"* the baseline, the fastest plain budget: {baseline['what']}"]
    for row, variant in zip(rows, found, strict=True):
        if not variant.key.startswith("plain"):
            note = f"; {row['note']}" if row["note"] else ""
            outside = f"; {row['outside_bounds']} scores outside their bounds" if "outside_bounds" in row else ""
            lines.append(f"{variant.what}: {variant.meaning}{note}{outside}")
    if more:
        few, many = more
        growth = many["peak_bytes"] / few["peak_bytes"] - 1.0
        counts = f"{few['retain_samples']} to {many['retain_samples']}"
        said = ", ".join(
            f"{row['peak_bytes'] / 2**20:.0f} ({row['peak_bytes_min'] / 2**20:.0f}-{row['peak_bytes_max'] / 2**20:.0f})"
            for row in more
        )
        lines.append(f"peak memory of certified SOIR from {counts} retain samples: {said} MiB, {100 * growth:+.1f} %")
    return lines


def bench(config: BenchConfig) -> list[Row]:
    """The command: measures, prints, writes the CSV.

    Returns:
        The rows of the CSV, without the provenance.

    Raises:
        UsageError: a setting out of range, or `--out` cannot be written.
        FillmError: as loading model and data does.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    asked, config = config, resolve(config, _say)
    work = load_workload(config)
    # The command line as given, but with the specs that stand behind its defaults.
    made = provenance(dataclasses.replace(asked, forget=config.forget, retain=config.retain), work)
    found = variants(work, config)
    seconds, outcomes = interleave(found, config.repeats, _say)
    rows, more = timing_rows(found, seconds, outcomes), []
    if config.accuracy:
        _say("float64 reference")
        add_accuracy(rows, found, outcomes, work, config.damping)
    if config.memory and peak_memory.available():
        more = memory_rows(rows, config, work, _say)
    write_csv(Path(config.out), [*rows, *more], made)
    size = f"{made['model_parameters'] / 1e6:.2f}M parameters, {made['model_tensors']} tensors"
    print(f"{size}; {made['cpu']}, {made['cores']} cores, {made['threads']} threads, torch {made['torch']}")
    print(table([*rows, *more]))
    print("\n".join(explain(rows, found, more)))
    return [*rows, *more]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `BenchConfig`.

    Returns:
        The exit code: 0 done, 2 wrong use or bad input.
    """

    def run(config: BenchConfig) -> None:
        bench(config)

    return run_command(BenchConfig, run, argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
