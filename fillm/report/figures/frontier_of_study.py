"""The study of masks (`python -m benchmarks.unlearning`): the retain loss at equal forgetting."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fillm.report.figures.data import Axis, Level, Panel, Series
from fillm.report.figures.repeats import mean_and_bar
from fillm.report.runs import Run

_LEVELS = (("forget_low", "retain_at_low"), ("forget_high", "retain_at_high"))  # a forget loss, the retain loss there
_FEW_STEPS = 8  # of a run that passed both levels too fast to say what lies between, if a lower rate was tried
_WHOLE = "whole model"
Found = dict[str, dict[Any, float]]  # choice -> (seed, draw) -> retain loss at the best rate


def study_panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel a loss, a row a mask; none without the study's file."""
    rows = [
        row
        for run in runs
        for table in run.tables.values()
        if run.command == "experiment" and {name for pair in _LEVELS for name in pair} <= set(table.column_names)
        for row in table.to_pylist()
    ]
    choices = tuple(dict.fromkeys(merged(row["choice"]) for row in rows))
    return [
        _panel([row for row in rows if row["loss"] == loss], loss, choices)
        for loss in dict.fromkeys(row["loss"] for row in rows)
    ]


def merged(choice: str) -> str:
    """The name of a choice; draws of random masks have one."""
    return "random" if choice.startswith("random ") else choice


def best_rates(rows: Sequence[dict[str, Any]], column: str) -> Found:
    """The least value over the rates tried, of every mask, seed and draw; NaN where no rate got there."""
    found: Found = {}
    lowest: dict[Any, float] = {}
    for row in rows:
        key = row["seed"], row["choice"]
        lowest[key] = min(row["lr"], lowest.get(key, math.inf))
    for row in rows:
        of_choice = found.setdefault(merged(row["choice"]), {})
        key = row["seed"], row["choice"]
        coarse = row["steps"] < _FEW_STEPS and row["lr"] > lowest[key]
        value = math.nan if row[column] is None or coarse else float(row[column])
        of_choice[key] = float(np.fmin(of_choice.get(key, math.nan), value))
    return found


def _panel(rows: Sequence[dict[str, Any]], loss: str, choices: tuple[str, ...]) -> Panel:
    series = []
    levels: tuple[Level, ...] = ()
    for style, (level, column) in enumerate(_LEVELS):
        words = f"at a forget loss of {rows[0][level]:g}"
        found = best_rates(rows, column)
        told = [mean_and_bar(list(found.get(choice, {}).values())) for choice in choices]
        mean, bar = (np.array(values) for values in zip(*told, strict=True))
        labels = tuple(_reached(choice, found.get(choice, {})) for choice in choices)
        place = np.arange(len(choices), dtype=np.float64)
        series.append(Series(words, mean, place, style, mean - bar, mean + bar, labels=labels))
        if _WHOLE in choices and not math.isnan(mean[choices.index(_WHOLE)]):
            levels = (Level(float(mean[choices.index(_WHOLE)]), "whole model", along="y"),)
    return Panel(
        title=loss,
        x=Axis("loss on the retain set", "nats a token", "log"),
        y=Axis("mask", scale="category", categories=choices, reverse=True),
        series=tuple(series),
        levels=levels,
    )


def _reached(choice: str, values: dict[Any, float]) -> str:
    good = sum(not math.isnan(value) for value in values.values())
    return f"{choice}: {good} of {len(values)} got there"
