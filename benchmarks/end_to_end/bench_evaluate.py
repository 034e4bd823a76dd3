"""What a full evaluation takes: python -m benchmarks.end_to_end.bench_evaluate --data-root DIR

`python -m fillm.evaluate` with every metric and answers of up to 200 tokens, on TOFU's forget01 and the model of
`benchmarks.end_to_end.bench_rank`, trained on TOFU rows, once; without a data root, on fictional-small's forget05. A
round of warm-up is the run that the others compare with, so that every figure is computed; that it compares the model
with itself costs no less. Two times are kept: of the evaluation, as run.yaml has it, from the first pass to the last
figure; of the whole command, from starting Python to the written folder. Rounds whose figures differ end it.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.end_to_end.commands import free_cores, run_bench, timed_command
from benchmarks.end_to_end.results import Row, spread_of
from benchmarks.end_to_end.settings import BenchConfig, command_line, shown
from benchmarks.end_to_end.workload import FICTIONAL, RECIPE, resolve, trained_folder
from benchmarks.kernels.rows import save
from fillm.data import load_rows
from fillm.models import load_model

PROGRAM = "python -m benchmarks.end_to_end.bench_evaluate"
OUT = Path("benchmarks/results/evaluate_cpu.csv")
TIMES = ("evaluation", "command")
TOFU, SMALL = ("tofu", "forget01"), ("fictional-small", "forget05")  # benchmark, forget split
QUICK = ("--num-forget", "4", "--num-retain", "4", "--max-new-tokens", "4")


def measured(words: Sequence[str], rounds: int, threads: int, folder: Path) -> Row:
    """Seconds of the rounds, and what was evaluated in each.

    Raises:
        UsageError: as the command.
        RuntimeError: if it fails, or two rounds come to other figures.
    """
    timed_command("evaluate", words, folder / "reference", threads)
    print("warm-up done", file=sys.stderr, flush=True)
    seconds: list[dict[str, float]] = []
    figures: list[Mapping[str, Any]] = []
    for number in range(rounds):
        out = folder / "run"
        taken, record = timed_command("evaluate", [*words, "--reference", str(folder / "reference")], out, threads)
        seconds.append({"evaluation": record["seconds"], "command": taken})
        figures.append(_figures(out))
        if figures[-1] != figures[0]:
            raise RuntimeError(f"round {number + 1} came to other figures than the first")
        print(f"round {number + 1} of {rounds}: {taken:.1f} s", file=sys.stderr, flush=True)
    missing = [name for name, value in figures[0].items() if value is None]
    row: Row = {"rounds": rounds, "threads": threads, "max_new_tokens": record["settings"]["max_new_tokens"]}
    row |= {"rows": pq.read_metadata(out / "rows.parquet").num_rows, "figures": len(figures[0]) - len(missing)}
    row |= {"missing": " ".join(missing), "peak_memory_bytes": record["peak_memory_bytes"]}
    for what in TIMES:
        row |= spread_of(f"{what}_seconds", [one[what] for one in seconds])
    return row


def _figures(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in summary.items() if name != "notes"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the row, writes the CSV; the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", metavar="DIR", help="as of bench_rank")
    parser.add_argument("--data-root", metavar="DIR", help="as of bench_rank")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="after one of warm-up (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the cores that it may use)")
    parser.add_argument("--quick", action="store_true", help="a few rows and a tiny model: whether it runs at all")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"(default: {OUT}; with --quick none)")
    given = parser.parse_args(argv)
    for name in ("rounds", "threads"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"--{name}: give at least 1")
    return run_bench(_bench, parser, given)


def _bench(given: argparse.Namespace) -> None:
    asked = BenchConfig(given.model, data_root=given.data_root)
    model = given.model or (_quick_model() if given.quick else resolve(asked, _say).model)
    benchmark, forget = TOFU if given.data_root or os.environ.get("FILLM_DATA") else SMALL
    threads = given.threads or free_cores()
    words = ["--model", str(model), "--benchmark", benchmark, "--forget", forget, "--device", "cpu"]
    words += ["--data-root", given.data_root] if given.data_root else []
    with tempfile.TemporaryDirectory() as folder:
        row = measured([*words, *(QUICK if given.quick else ())], given.rounds, threads, Path(folder))
    made = {"benchmark": benchmark, "forget": forget, "model": shown(model), "cores": free_cores()}
    made["model_parameters"] = load_model(str(model), device="cpu").num_parameters()
    told = f"--rounds {given.rounds} --threads {threads}{' --quick' if given.quick else ''}"
    out = given.out or (None if given.quick else OUT)
    save(out, [made | row | {"command": f"{command_line(asked, PROGRAM)} {told}"}])
    for what in TIMES:
        middle, low, high = (row[f"{what}_seconds{end}"] for end in ("", "_min", "_max"))
        print(f"{what}: {middle:.1f} s ({low:.1f} to {high:.1f}), {row['rows']} rows, {row['figures']} figures")


def _quick_model() -> Path:
    recipe = {**RECIPE, "architecture": "tiny", "vocab_size": 300, "epochs": 1, "target_loss": None}
    return trained_folder(load_rows(FICTIONAL[0])[:20], recipe, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
