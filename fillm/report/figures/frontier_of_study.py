"""Studies of masks: the retain loss at equal forgetting."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fillm.report.figures.damage import LEVELS, WHOLE, Row, by_model, merged, model_of
from fillm.report.figures.data import Axis, Level, Panel, Series
from fillm.report.figures.intervals import Interval, interval
from fillm.report.figures.mask_studies import MaskStudy, mask_studies
from fillm.report.runs import Run

Drawn = dict[Any, list[float]]  # model -> a value a draw, NaN where it never got there


def study_panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel a study and loss, a row a mask, every study beginning a new line; none without a study's file."""
    studies = mask_studies(runs)
    named = len(studies) > 1
    return [
        replace(_panel(study, loss, f"{study.run.name}: {loss}" if named else loss), new_row=i == 0)
        for study in studies
        for i, loss in enumerate(study.losses)
    ]


def over_models(drawn: Drawn, geometric: bool) -> Interval:
    """The mean over models and its 95 % interval; the draws of one model are one value, their mean.

    Args:
        drawn: what is NaN does not count.
        geometric: whether both means are of the logarithms.
    """
    good = [np.array([value for value in values if not math.isnan(value)]) for values in drawn.values()]
    means = [math.exp(np.log(some).mean()) if geometric else float(some.mean()) for some in good if len(some)]
    return interval(means, geometric)


def _panel(study: MaskStudy, loss: str, title: str) -> Panel:
    rows = [row for row in study.rows if row["loss"] == loss]
    choices = study.choices
    # Losses are above 0; a file may hold anything.
    logarithmic = all(row[column] is None or row[column] > 0.0 for row in rows for _, column in LEVELS)
    place = np.arange(len(choices), dtype=np.float64)
    series = []
    levels: tuple[Level, ...] = ()
    for style, (level, column) in enumerate(LEVELS):
        drawn = [_drawn([row for row in rows if merged(row["choice"]) == choice], column) for choice in choices]
        found = [over_models(values, logarithmic) for values in drawn]
        mean, low, high = (np.array([getattr(one, end) for one in found]) for end in ("mean", "low", "high"))
        labels = tuple(_reached(choice, values) for choice, values in zip(choices, drawn, strict=True))
        name = f"at a forget loss of {rows[0][level]:g}"
        series.append(Series(name, mean, place, style, low, high, labels=labels))
        if WHOLE in choices and not math.isnan(mean[choices.index(WHOLE)]):
            levels = (Level(float(mean[choices.index(WHOLE)]), WHOLE, along="y"),)
    return Panel(
        title=title,
        x=Axis("loss on the retain set", "nats a token", "log" if logarithmic else "linear"),
        y=Axis("mask", scale="category", categories=choices, reverse=True),
        series=tuple(series),
        levels=levels,
    )


def _drawn(rows: Sequence[Row], column: str) -> Drawn:
    return by_model((model_of(row), math.nan if row[column] is None else float(row[column])) for row in rows)


def _reached(choice: str, drawn: Drawn) -> str:
    values = [value for some in drawn.values() for value in some]
    good = sum(not math.isnan(value) for value in values)
    return f"{choice}: {good} of {len(values)} got there"
