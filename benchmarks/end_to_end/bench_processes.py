"""How much faster several processes rank: python -m benchmarks.end_to_end.bench_processes --processes 2

`python -m fillm.rank` beside the same under `torchrun`, every process with one thread, on the model and data of
`benchmarks.end_to_end.bench_rank`. After a round of warm-up, every round runs each once, one after the other; ratios
are taken within a round. Three times are kept of every run: of the passes alone, as run.yaml has them; of the ranking,
which the checks before and the scores after belong to; of the whole command, of which starting Python takes the same
in all. A machine with fewer free cores than processes, or one that does something else as well, says nothing.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.commands import free_cores, run_bench, timed_command
from benchmarks.end_to_end.results import Row, spread_of
from benchmarks.end_to_end.settings import BenchConfig, command_line, shown
from benchmarks.end_to_end.workload import resolve
from benchmarks.kernels.rows import save
from fillm.rank import Ranking

PROGRAM = "python -m benchmarks.end_to_end.bench_processes"
TIMES = ("passes", "ranking", "command")
# Without u, and with it.
VARIANTS: Mapping[str, Sequence[str]] = {"certified": [], "update": ["--save-update"]}


def timed(words: Sequence[str], processes: int, out: Path) -> dict[str, float]:
    """Seconds of one run into `out`, by what of it.

    Raises:
        UsageError, RuntimeError: as `timed_command`.
    """
    taken, record = timed_command("rank", words, out, threads=1, processes=processes)
    return {
        "passes": sum(row["seconds"] for row in record["passes"]),
        "ranking": record["seconds"],
        "command": taken,
    }


def difference(found: Path, wanted: Path) -> float:
    """The largest relative difference between the scores of two run folders."""
    ours, theirs = (Ranking.load(path).scores for path in (found, wanted))
    compared = ((ours[name], score) for name, score in theirs.items() if 0.0 < abs(score) < float("inf"))
    return max((abs(own - score) / abs(score) for own, score in compared), default=0.0)


def interleave(words: Sequence[str], counts: Sequence[int], rounds: int, folder: Path) -> list[Row]:
    """The rows of all variants and numbers of processes; the first of `counts` is what the others are held against."""
    runs = {(variant, count): folder / f"{variant}-{count}" for variant in VARIANTS for count in counts}
    seconds: dict[Any, list[dict[str, float]]] = {key: [] for key in runs}
    for number in range(1 + rounds):
        for (variant, count), out in runs.items():
            found = timed([*words, *VARIANTS[variant]], count, out)
            if number:
                seconds[variant, count].append(found)
        said = ", ".join(f"{v} {n}: {found[-1]['passes']:.2f} s" for (v, n), found in seconds.items() if found)
        print(f"round {number} of {rounds}: {said}" if number else "warm-up done", file=sys.stderr, flush=True)
    rows = []
    for (variant, count), out in runs.items():
        base = seconds[variant, counts[0]]
        row: Row = {"variant": variant, "processes": count, "threads": 1, "rounds": rounds}
        for what in TIMES:
            own = [found[what] for found in seconds[variant, count]]
            row |= spread_of(f"{what}_seconds", own)
            row |= spread_of(f"{what}_speedup", [b[what] / o for b, o in zip(base, own, strict=True)])
        row["largest_difference"] = difference(out, runs[variant, counts[0]]) if count != counts[0] else 0.0
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a line a row, writes the CSV; the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", metavar="DIR", help="as of bench_rank")
    parser.add_argument("--forget", metavar="SPEC", help="as of bench_rank")
    parser.add_argument("--retain", metavar="SPEC", help="as of bench_rank")
    parser.add_argument("--data-root", metavar="DIR", help="as of bench_rank")
    parser.add_argument("--tokens-per-batch", type=int, metavar="N", help="as of fillm.rank")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], metavar="N", help="beside one (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="after one of warm-up (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rank_processes_cpu.csv"), metavar="FILE")
    given = parser.parse_args(argv)
    if min(given.rounds, *given.processes) < 1:
        parser.error("--rounds and --processes: give at least 1")
    return run_bench(_bench, parser, given)


def _bench(given: argparse.Namespace) -> None:
    asked = BenchConfig(given.model, forget=given.forget, retain=given.retain, data_root=given.data_root)
    config = resolve(asked, lambda line: print(line, file=sys.stderr, flush=True))
    words = ["--model", str(config.model), "--forget", str(config.forget), "--retain", str(config.retain)]
    words += ["--data-root", config.data_root] if config.data_root else []
    words += ["--tokens-per-batch", str(given.tokens_per_batch)] if given.tokens_per_batch else []
    counts = [1, *sorted({*given.processes} - {1})]
    with tempfile.TemporaryDirectory() as folder:
        rows = interleave([*words, "--device", "cpu"], counts, given.rounds, Path(folder))
    made = {"cores": free_cores(), "forget": shown(config.forget), "retain": shown(config.retain)}
    made["command"] = f"{command_line(asked, PROGRAM)} --processes {' '.join(map(str, counts[1:]))}".strip()
    save(given.out, [row | made for row in rows])
    for row in rows:
        times = ", ".join(
            f"{what} {row[f'{what}_seconds']:.2f} s ({row[f'{what}_speedup']:.2f}x, "
            f"{row[f'{what}_speedup_min']:.2f} to {row[f'{what}_speedup_max']:.2f})"
            for what in TIMES
        )
        print(f"{row['variant']}, {row['processes']} processes: {times}; differs by {row['largest_difference']:.1e}")


if __name__ == "__main__":
    sys.exit(main())
