"""The runs as CSV, a line as soon as it is known; the table over models; the picture."""

import csv
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.end_to_end.results import commit, processor
from benchmarks.unlearning.study import AT_LEVELS, FORGET_LEVELS, Record
from fillm.report.figures.damage import FEW_STEPS

COLUMNS = (
    "model_parameters", "seed", "choice", "loss", "lr", "mask", "selected_parameters", "selected_tensors", "steps",
    "forget_start", "retain_start", "forget_end", "retain_end", *FORGET_LEVELS, *AT_LEVELS, "cpu", "commit", "command",
)  # fmt: skip
_WHOLE = "whole model"


class Runs:
    """A CSV that grows by whole lines, and what is in it.

    Args:
        path: the file.
        command: that makes it; a file of another command is not continued.
        resume: keep the lines that are there.
        columns: its columns.
    """

    def __init__(self, path: Path, command: str, resume: bool, columns: Sequence[str] = COLUMNS) -> None:
        self.path, self._made = path, {"cpu": processor(), "commit": commit(), "command": command}
        self._columns = columns
        self.records: list[Record] = []
        if resume and path.exists():
            with path.open(newline="") as file:
                self.records = [_numbers(row) for row in csv.DictReader(file) if row["command"] == command]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in record.items()} for record in self.records)
        os.replace(partial, path)

    def done(self, seed: int) -> list[Record]:
        """The runs of one model that are in it."""
        return [record for record in self.records if record["seed"] == seed]

    def add(self, record: Record) -> None:
        """Appends one line."""
        record = {**record, **self._made}
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writerow({name: _cell(value) for name, value in record.items()})
        self.records.append(record)


def _numbers(row: dict[str, str]) -> Record:
    whole, text = (
        ("model_parameters", "seed", "selected_parameters", "selected_tensors", "steps"),
        ("choice", "loss", "mask", "cpu", "commit", "command"),
    )
    return {
        name: value if name in text else int(value) if name in whole else float(value) for name, value in row.items()
    }


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def best_rates(records: Iterable[Record], column: str) -> dict[tuple[str, str], dict[int, float]]:
    """The retain loss at a level by (loss, choice) and model, at the best of the rates; NaN where none got there.

    A run that passed the levels in so few steps that a lower rate was tried does not count: what lies between
    two of its evaluations is not a line.
    """
    cells: dict[tuple[str, str], dict[int, list[Record]]] = {}
    for record in records:
        of_models = cells.setdefault((record["loss"], record["choice"]), {})
        of_models.setdefault(record["seed"], []).append(record)
    return {cell: {seed: best(tried, column) for seed, tried in of_models.items()} for cell, of_models in cells.items()}


def best(tried: Sequence[Record], column: str) -> float:
    """Of the runs of one mask and loss in one model, the least; NaN if none got there. Coarse runs do not count."""
    lowest = min(record["lr"] for record in tried)
    values = [record[column] for record in tried if record["steps"] >= FEW_STEPS or record["lr"] == lowest]
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def table(records: Sequence[Record], column: str, level: float) -> str:
    """Mean over models, least to most in brackets, of the retain loss at a forget loss; random draws are one line."""
    found, losses = best_rates(records, column), list(dict.fromkeys(record["loss"] for record in records))
    merged: dict[tuple[str, str], list[float]] = {}
    for (loss, choice), of_models in found.items():
        name = "random" if choice.startswith("random ") else choice
        merged.setdefault((name, loss), []).extend(of_models.values())
    names = list(dict.fromkeys(name for name, _ in merged))
    lines = [["mask", *losses]]
    lines += [[name, *(_spread(merged.get((name, loss), [])) for loss in losses)] for name in names]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = f"retain loss at a forget loss of {level:g}, nats a token: mean over models (least to most)"
    return "\n".join([title, *body])


def _spread(values: Sequence[float]) -> str:
    good = [value for value in values if not math.isnan(value)]
    if not good:
        return "never" if values else "-"
    lost = f", {len(values) - len(good)} never" if len(good) < len(values) else ""
    return f"{np.mean(good):.3f} ({min(good):.3f}-{max(good):.3f}{lost})"


def draw(records: Sequence[Record], column: str, level: float, path: Path) -> None:
    """A dot a model and choice, a panel a loss, the whole model's mean as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    found, losses = best_rates(records, column), list(dict.fromkeys(record["loss"] for record in records))
    names = list(dict.fromkeys("random" if r["choice"].startswith("random ") else r["choice"] for r in records))
    figure = Figure(figsize=(2.2 + 2.4 * len(losses), 0.9 + 0.2 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
    panels[0].invert_yaxis()
    for axes, loss in zip(panels, losses, strict=True):
        for (of_loss, choice), of_models in found.items():
            if of_loss == loss:
                place = names.index("random" if choice.startswith("random ") else choice)
                colour = "#228833" if choice.startswith(("random", "whole", "all")) else "#4477aa"
                axes.plot(
                    list(of_models.values()), [place] * len(of_models), "o", color=colour, markersize=3.5, alpha=0.8
                )
        whole = [v for v in found.get((loss, _WHOLE), {}).values() if not math.isnan(v)]
        if whole:
            axes.axvline(float(np.mean(whole)), color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(loss, fontsize=9, loc="left")
        axes.set_xlabel(f"retain loss at forget loss {level:g} (nats a token)", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
