"""The comparison with the retain-only model (`python -m benchmarks.forget_quality`): utility against Forget Quality."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fillm.report.figures.damage import by_model, merged, model_of
from fillm.report.figures.data import Axis, Panel, Series
from fillm.report.figures.frontier_of_study import over_models
from fillm.report.result_files import rows_of
from fillm.report.runs import Run

_NO_LOSS = "none"  # of the models that nothing was unlearned in
_JUDGE = "retain-only model"  # a Forget Quality of 1 by definition


def quality_panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel a loss, a point a mask; none without the study's file.

    The full model and the retain-only model of another seed stand in every panel, hollow.
    """
    rows = [
        row
        for _, rows in rows_of(runs, "quality")
        for row in rows
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
        x, y = (
            over_models(by_model((model_of(row), float(row[name])) for row in some), geometric)
            for name, geometric in (("forget_quality", logarithmic), ("model_utility", False))
        )
        ends = (None if x.count == 1 else np.array([end]) for end in (x.low, x.high, y.low, y.high))
        untouched = some[0]["loss"] == _NO_LOSS
        series.append(Series(choice, np.array([x.mean]), np.array([y.mean]), style, *ends, hollow=untouched))
    return Panel(
        title=loss,
        x=Axis("Forget Quality (p-value)", scale="log" if logarithmic else "linear"),
        y=Axis("Model Utility"),
        series=tuple(series),
    )
