"""How the losses went while a model was trained or unlearned."""

from collections.abc import Sequence

import numpy as np

from fillm.report.figures.data import Axis, FigureData, Panel, Series
from fillm.report.runs import Run

# Columns of the logs in the order in which they get their styles, and what they are called.
_LOSSES = {
    "loss": "training loss",
    "eval_loss": "loss on the evaluation set",
    "forget_loss": "loss on the forget set",
    "retain_loss": "loss on the retain set",
}
_WIDE = 20.0  # largest over smallest value from which on an axis is logarithmic


def training_curves(runs: Sequence[Run]) -> FigureData | None:
    """One panel a fine-tuning or unlearning: every loss of its log against the step; None without a measured one."""
    panels = [panel for run in runs if run.command in ("finetune", "unlearn") if (panel := _panel(run)) is not None]
    if not panels:
        return None
    caption = (
        "Losses by optimiser step, the mean over samples of each one's mean over its answer tokens. The training loss "
        "is of the samples of the step before it is taken; the others were measured after it, a point a measurement."
    )
    return FigureData("training_curves", "Losses by step", caption, tuple(panels), columns=min(3, len(panels)))


def _panel(run: Run) -> Panel | None:
    log = run.tables["log"]
    steps = np.array(log["step"].to_pylist(), dtype=np.float64)
    series = []
    for style, (column, name) in enumerate(_LOSSES.items()):
        if column not in log.column_names:
            continue
        values = np.array(log[column].to_pylist(), dtype=np.float64)
        known = ~np.isnan(values)
        x, y = steps[known], values[known]
        if run.command == "unlearn" and column in run.summary:
            x, y = np.insert(x, 0, 0.0), np.insert(y, 0, run.summary[column]["before"])
        if len(x):
            series.append(Series(name, x, y, style, line=True))
    if not series:
        return None
    every = np.concatenate([one.y for one in series])
    logarithmic = every.min() > 0.0 and every.max() / every.min() > _WIDE
    loss = Axis("loss", "nats a token", "log" if logarithmic else "linear")
    return Panel(run.name, Axis("optimiser step", whole=True), loss, tuple(series))
