"""Whether anything grows: python -m benchmarks.end_to_end.soak --minutes 60

One process ranks, unlearns and evaluates over and over, through the commands' own `main`, at small size: rankings from
two passes, with `u`, from a store that is built anew, along a path by rounds, and by exact Gram matrices take turns,
and so do losses and optimisers. After every loop it notes what the process holds: resident and anonymous memory, open
file descriptors, threads, and the files below its folder. Nothing is collected or trimmed by hand. A Theil-Sen line
through the second half of the time says what memory grew in it; more than `ALLOWED` of what was held half-way, or one
descriptor, thread or file more at the end than half-way, is growth, and the exit code 1.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import theilslopes

from benchmarks.end_to_end.commands import free_cores, run_bench
from benchmarks.end_to_end.results import Row
from benchmarks.kernels.rows import save
from fillm.evaluate.__main__ import main as evaluate
from fillm.rank.__main__ import main as rank
from fillm.rank.console import Console
from fillm.rank.default_model import DEFAULT_FORGET, DEFAULT_RETAIN, default_model
from fillm.unlearn.__main__ import main as unlearn

PROGRAM = "python -m benchmarks.end_to_end.soak"
OUT = Path("benchmarks/results/soak_cpu.csv")
ALLOWED = 0.01  # of the anonymous memory held half-way: about what one freed block that is not given back comes to
FEW = ("--num-forget", "8", "--num-retain", "16")
ELEMENT = ("--granularity", "element")
# What to rank by, what to select, how to unlearn; they take turns.
TURNS: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...] = (
    ("certified", (), "bottom:0.1", ("--loss", "ga")),
    ("update", ("--save-update",), "top:0.1", ("--loss", "grad-diff", "--optimizer", "sophia")),
    ("store", ("--compression", "countsketch", "--store", "{store}"), "top:0.2", ("--loss", "npo")),
    ("path", ("--method", "path", *ELEMENT, "--path-rounds", "2"), "top:0.1", ("--loss", "npo")),
    ("woodbury", ("--curvature", "woodbury"), "top:0.1", ("--loss", "kl", "--optimizer", "sophia")),
    ("first-order", ("--method", "first-order"), "bottom:0.2", ("--loss", "simnpo")),
)  # fmt: skip
HELD = ("resident_bytes", "anonymous_bytes", "descriptors", "threads", "files")


def held(folder: Path) -> dict[str, int]:
    """What this process holds, as /proc has it (Linux), and how many files lie below `folder`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in status) if "kB" in rest}
    with os.scandir("/proc/self/fd") as listed:
        descriptors = sum(1 for _ in listed) - 1  # without the one that lists them
    return {
        "resident_bytes": 1024 * sizes["VmRSS"],
        "anonymous_bytes": 1024 * sizes["RssAnon"],
        "descriptors": descriptors,
        "threads": threading.active_count(),
        "files": sum(len(files) for _, _, files in os.walk(folder)),
    }


def loop(turn: int, model: str, folder: Path) -> str:
    """Ranks, unlearns and evaluates once, into the same folders as ever; says what it ranked by.

    Raises:
        RuntimeError: a command ended with other than 0; with what it said.
    """
    name, ranking, select, unlearning = TURNS[turn % len(TURNS)]
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    data = ["--model", model, "--forget", DEFAULT_FORGET, "--retain", DEFAULT_RETAIN, "--device", "cpu", *FEW]
    words = [word.format(store=store) for word in ranking]
    _done(rank, [*data, *words, "--out", str(folder / "ranking"), "--overwrite"])
    chosen = ["--ranking", str(folder / "ranking"), "--select", select, "--max-steps", "3", "--eval-retain", "8"]
    _done(unlearn, [*data, *chosen, *unlearning, "--out", str(folder / "unlearned"), "--overwrite"])
    asked = ["--benchmark", "fictional-small", "--forget", "forget05", "--max-new-tokens", "8", "--device", "cpu"]
    few = ["--num-forget", "4", "--num-retain", "4"]
    unlearned = ["--model", str(folder / "unlearned" / "model")]
    _done(evaluate, [*unlearned, *asked, *few, "--out", str(folder / "scores"), "--overwrite"])
    return name


def _done(command: Callable[[Sequence[str]], int], words: Sequence[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command(words)
    if code:
        raise RuntimeError(f"{' '.join(words)}\nended with {code}:\n{said.getvalue()}")


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What grew over the second half of the time, by what it is.

    Args:
        rows: of the loops, in order, with `ranking`, `seconds` and the entries of `HELD`.

    Returns:
        Of memory, the slope of Theil and Sen times the length of that half, in bytes, each loop beside the median of
        its kind: what a kind takes is no growth. Of what is counted, the most of the last loops of all kinds less the
        most of the first ones.
    """
    end = rows[-1]["seconds"]
    late = [row for row in rows if row["seconds"] >= end / 2]
    times = [row["seconds"] for row in late]
    grown: dict[str, float] = {}
    for name in HELD:
        values = [row[name] for row in late]
        if name.endswith("bytes"):
            usual = {
                kind: median(r[name] for r in late if r["ranking"] == kind) for kind in {r["ranking"] for r in late}
            }
            beside = [row[name] - usual[row["ranking"]] for row in late]
            grown[name] = float(theilslopes(beside, times).slope) * (times[-1] - times[0]) if len(late) > 1 else 0.0
        else:
            grown[name] = max(values[-len(TURNS) :]) - max(values[: len(TURNS)])
    return grown


def what_grows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of `growth`, what is more than is allowed."""
    half_way = next(row for row in rows if row["seconds"] >= rows[-1]["seconds"] / 2)
    allowed = {name: ALLOWED * half_way[name] if name.endswith("bytes") else 0.0 for name in HELD}
    return {name: value for name, value in growth(rows).items() if value > allowed[name]}


def soak(seconds: float, model: str, folder: Path, say: Callable[[str], None]) -> list[Row]:
    """A row a loop until the time is up, every ranking at least once."""
    rows: list[Row] = []
    begun = said = time.monotonic()
    while len(rows) < len(TURNS) or time.monotonic() - begun < seconds:
        name = loop(len(rows), model, folder)
        now = time.monotonic()
        rows.append({"loop": len(rows), "ranking": name, "seconds": round(now - begun, 3), **held(folder)})
        if now - said >= 60.0:
            said = now
            say(f"{now - begun:.0f} s, {len(rows)} loops: {_shown(rows[-1])}")
    return rows


def _shown(values: Mapping[str, float]) -> str:
    shown = []
    for name in HELD:
        what, memory = name.removesuffix("_bytes"), name.endswith("_bytes")
        shown.append(f"{what} {values[name] / 2**20:.1f} MiB" if memory else f"{what} {values[name]:g}")
    return ", ".join(shown)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Memory and descriptors over time, as a PNG."""
    from benchmarks.experiment.figure import panels
    from fillm.report.theme import LIGHT

    figure, axes = panels(["memory", "open file descriptors and threads"], 8.0, 2.8)
    minutes = [row["seconds"] / 60 for row in rows]
    for style, name in enumerate(("resident_bytes", "anonymous_bytes")):
        axes[0].plot(minutes, [row[name] / 2**20 for row in rows], color=LIGHT.colour(style), linewidth=0.8,
                     label=name.removesuffix("_bytes"))  # fmt: skip
    axes[0].set_ylabel("MiB", fontsize=7)
    for style, name in enumerate(("descriptors", "threads")):
        axes[1].plot(minutes, [row[name] for row in rows], color=LIGHT.colour(style), linewidth=0.8, label=name)
    for one in axes:
        one.set_ylim(bottom=0)
        one.set_xlabel("minutes", fontsize=7)
        one.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Soaks, writes the CSV and the picture beside it, prints what grew; 1 if anything did."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", metavar="DIR", help="a small one (default: the embedded default model)")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="(default: 60)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"(default: {OUT})")
    given = parser.parse_args(argv)
    if not 0.0 <= given.minutes < float("inf"):
        parser.error("--minutes: give 0 or more")
    grown: dict[str, float] = {}
    code = run_bench(lambda one: grown.update(_soaked(one)), parser, given)
    return code or int(bool(grown))


def _soaked(given: argparse.Namespace) -> dict[str, float]:
    model = given.model or str(default_model(Console()))
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(60.0 * given.minutes, model, Path(folder), _say)
    words = [f"--model {Path(given.model).name}"] if given.model else []
    command = " ".join([PROGRAM, *words, f"--minutes {given.minutes:g}"])
    save(given.out, [row | {"cores": free_cores(), "command": command} for row in rows])
    draw(rows, given.out.with_suffix(".png"))
    print(f"{len(rows)} loops in {rows[-1]['seconds'] / 60:.1f} minutes; at the end {_shown(rows[-1])}")
    print(f"grown over the second half of the time: {_shown(growth(rows))}")
    return what_grows(rows)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
