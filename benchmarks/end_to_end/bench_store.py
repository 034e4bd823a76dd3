"""What a store saves the next ranking: python -m benchmarks.end_to_end.bench_store

Every round builds a store anew and ranks (a forget and a retain pass), then ranks another forget set of the same size
from the store, which leaves the retain pass out; one thread. The ratio is taken within a round. Two times are kept: of
the ranking, as run.yaml has it, from reading the model to the picture of the scores; of the whole command, of which
starting Python takes the same in both. Without a data root, small fictional sets.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.end_to_end.bench_processes import timed
from benchmarks.end_to_end.commands import run_bench
from benchmarks.end_to_end.results import Row, spread_of
from benchmarks.end_to_end.settings import BenchConfig, command_line, shown
from benchmarks.end_to_end.workload import resolve
from benchmarks.kernels.rows import save

PROGRAM = "python -m benchmarks.end_to_end.bench_store"
TIMES = ("ranking", "command")
# Forget set, retain set, another forget set.
TOFU = ("tofu:full[3920:3960]", "tofu:full[:3600]", "tofu:full[3960:]")
FICTIONAL = ("fictional-small:forget05[:20]", "fictional-small:retain95[:360]", "fictional-small:forget05[20:]")


def measured(words: Sequence[str], sets: Sequence[str], rounds: int, folder: Path) -> Row:
    """The row of one kind of sketch: seconds of both rankings, and the second over the first within a round."""
    seconds = []
    for number in range(rounds):
        shutil.rmtree(folder / "store", ignore_errors=True)
        stored = [*words, "--store", str(folder / "store")]
        first = timed([*stored, "--forget", sets[0], "--retain", sets[1]], 1, folder / "first")
        second = timed([*stored, "--forget", sets[2]], 1, folder / "second")
        if "retain" in (row["pass"] for row in _record(folder / "second")["passes"]):
            raise RuntimeError("the second ranking went through the retain set")
        seconds.append((first, second))
        told = f"{first['ranking']:.2f} s, from the store {second['ranking']:.2f} s"
        print(f"round {number + 1} of {rounds}: {told}", file=sys.stderr, flush=True)
    row: Row = {"rounds": rounds, "threads": 1}
    row["store_bytes"] = sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file())
    for what in TIMES:
        row |= spread_of(f"{what}_first_seconds", [first[what] for first, _ in seconds])
        row |= spread_of(f"{what}_second_seconds", [second[what] for _, second in seconds])
        row |= spread_of(f"{what}_ratio", [second[what] / first[what] for first, second in seconds])
    return row


def _record(folder: Path) -> dict:
    return yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a line a row, writes the CSV; the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", metavar="DIR", help="as of bench_rank")
    parser.add_argument("--forget", metavar="SPEC", help="of the ranking that fills the store")
    parser.add_argument("--retain", metavar="SPEC", help="whose sketches are stored")
    parser.add_argument("--other", metavar="SPEC", help="forget set of the ranking from the store")
    parser.add_argument("--data-root", metavar="DIR", help="as of bench_rank")
    parser.add_argument("--compression", nargs="+", default=["countsketch"], metavar="KIND", help="as of fillm.rank")
    parser.add_argument("--sketch-dim", type=int, default=4096, metavar="K", help="as of fillm.rank")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rank_store_cpu.csv"), metavar="FILE")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error("--rounds: give at least 1")
    return run_bench(_bench, parser, given)


def _bench(given: argparse.Namespace) -> None:
    asked = BenchConfig(given.model, data_root=given.data_root)
    config = resolve(asked, lambda line: print(line, file=sys.stderr, flush=True))
    defaults = TOFU if config.data_root else FICTIONAL
    sets = [own or default for own, default in zip((given.forget, given.retain, given.other), defaults, strict=True)]
    words = ["--model", str(config.model), "--sketch-dim", str(given.sketch_dim), "--device", "cpu"]
    words += ["--data-root", config.data_root] if config.data_root else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.compression:
            row: Row = {"compression": kind, "sketch_dim": given.sketch_dim}
            row |= measured([*words, "--compression", kind], sets, given.rounds, Path(folder))
            rows.append(row)
            first, second = row["ranking_first_seconds"], row["ranking_second_seconds"]
            spread = f"{row['ranking_ratio']:.1%} ({row['ranking_ratio_min']:.1%} to {row['ranking_ratio_max']:.1%})"
            print(f"{kind}: {first:.2f} s, from the store {second:.2f} s: {spread}")
    made = dict(zip(("forget", "retain", "other"), map(shown, sets), strict=True))
    # The sets have columns of their own.
    told = f"--compression {' '.join(given.compression)} --sketch-dim {given.sketch_dim} --rounds {given.rounds}"
    save(given.out, [row | made | {"command": f"{command_line(asked, PROGRAM)} {told}"} for row in rows])


if __name__ == "__main__":
    sys.exit(main())
