"""What keeping costs at equal forgetting: damage, and damage over that of changing the whole model."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fillm.report.figures.intervals import Interval, interval

Row = Mapping[str, Any]
WHOLE = "whole model"
# A forget loss, and the retain loss where it was reached.
LEVELS = (("forget_low", "retain_at_low"), ("forget_high", "retain_at_high"))
# A run that passes the levels in fewer says too little of what lies between; one at a lower rate is read.
FEW_STEPS = 8
_LEAST = 1e-3  # nats a token; a damage that a ratio can be taken of


def merged(choice: str) -> str:
    """The name of a choice; draws of random masks of one size have one: `random 2, 0.1` is `random, 0.1`."""
    return re.sub(r"^random \d+", "random", choice)


def model_of(row: Row) -> tuple[Any, ...]:
    """What tells models apart, whatever of it a study says."""
    return row.get("family"), row.get("model_parameters"), row["seed"]


def by_model(pairs: Iterable[tuple[Any, float]]) -> dict[Any, list[float]]:
    """The values of every model."""
    found: dict[Any, list[float]] = {}
    for model, value in pairs:
        found.setdefault(model, []).append(value)
    return found


def damage(row: Row, column: str = LEVELS[0][1]) -> float:
    """Nats a token that the retain set lost until the forget loss had reached a level; NaN if it never did."""
    value = row[column]
    return math.nan if value is None else float(value) - float(row["retain_start"])


def against_whole(rows: Sequence[Row], choice: str, loss: str, column: str = LEVELS[0][1]) -> tuple[Interval, int]:
    """A choice's damage over that of the whole model in the same models: geometric mean, and how many never got there.

    Draws of one model (`random 0`, `random 1`, ...) are one value, their geometric mean. A damage below a thousandth of
    a nat counts as that. Models whose whole never got there are left out. Those where the choice never did are in the
    count alone, so that a mean beside a count flatters the choice.

    Args:
        rows: one a model, choice and loss, with `retain_start` and `column`.
        choice: as `merged` names it.
        loss: of the rows that are looked at.
        column: the retain loss at a level of the forget loss.
    """
    whole = {model_of(row): damage(row, column) for row in rows if row["choice"] == WHOLE and row["loss"] == loss}
    ratios = []
    never = 0
    for row in rows:
        model = model_of(row)
        if merged(row["choice"]) != choice or row["loss"] != loss or math.isnan(whole.get(model, math.nan)):
            continue
        ratio = max(damage(row, column), _LEAST) / max(whole[model], _LEAST)
        if math.isnan(ratio):
            never += 1
        else:
            ratios.append((model, math.log(ratio)))
    means = [math.exp(float(np.mean(logs))) for logs in by_model(ratios).values()]
    return interval(means, geometric=True), never
