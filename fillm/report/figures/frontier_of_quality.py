"""The comparison with the retain-only model (`python -m benchmarks.forget_quality`): utility against Forget Quality."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fillm.report.figures.data import Axis, Panel, Series
from fillm.report.figures.frontier_of_study import merged
from fillm.report.figures.repeats import centre_and_ends
from fillm.report.runs import Run

_COLUMNS = {"choice", "loss", "forget_quality", "model_utility"}
_NO_LOSS = "none"  # of the models that nothing was unlearned in
_JUDGE = "retain-only model"  # a Forget Quality of 1 by definition


def quality_panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel a loss, a point a mask; none without the study's file.

    The full model and the retain-only model of another seed stand in every panel, hollow.
    """
    rows = [
        row
        for run in runs
        for table in run.tables.values()
        if run.command == "experiment" and set(table.column_names) >= _COLUMNS
        for row in table.to_pylist()
        if (row["choice"], row["loss"]) != (_JUDGE, _NO_LOSS)
    ]
    losses = [loss for loss in dict.fromkeys(row["loss"] for row in rows) if loss != _NO_LOSS]
    choices = list(dict.fromkeys(merged(row["choice"]) for row in rows))
    return [_panel([row for row in rows if row["loss"] in (loss, _NO_LOSS)], loss, choices) for loss in losses]


def _panel(rows: Sequence[dict[str, Any]], loss: str, choices: Sequence[str]) -> Panel:
    logarithmic = all(row["forget_quality"] > 0.0 for row in rows)
    series = []
    for style, choice in enumerate(choices):
        some = [row for row in rows if merged(row["choice"]) == choice]
        if not some:
            continue
        x, *of_x = centre_and_ends([float(row["forget_quality"]) for row in some], logarithmic)
        y, *of_y = centre_and_ends([float(row["model_utility"]) for row in some], logarithmic=False)
        x_low, x_high, y_low, y_high = (None if len(some) == 1 else np.array([end]) for end in (*of_x, *of_y))
        untouched = some[0]["loss"] == _NO_LOSS
        place = np.array([x]), np.array([y])
        series.append(Series(choice, *place, style, x_low, x_high, y_low, y_high, hollow=untouched))
    return Panel(
        title=loss,
        x=Axis("Forget Quality (p-value)", scale="log" if logarithmic else "linear"),
        y=Axis("Model Utility"),
        series=tuple(series),
    )
