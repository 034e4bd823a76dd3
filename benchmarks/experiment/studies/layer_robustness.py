"""Unlearning one layer, or the matrices of one kind, at a time: what forgets, and what it costs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiment import forgetting
from benchmarks.experiment.case import Case
from benchmarks.experiment.figure import dots, panels, save
from benchmarks.experiment.forgetting import at_both_levels
from benchmarks.experiment.results import Record, finite
from benchmarks.unlearning.settings import SCOPE
from benchmarks.unlearning.study import losses_after
from fillm.masks import Mask
from fillm.models import TensorInfo, catalogue, select_tensors
from fillm.report.figures.damage import WHOLE
from fillm.report.figures.intervals import Interval, interval

KEY = ("choice", "loss")
COLUMNS = (*forgetting.COLUMNS, "fixed_rate", "fixed_steps", "forget_after_fixed", "retain_after_fixed")
DEFAULTS: Mapping[str, Any] = {**forgetting.DEFAULTS, "fixed_rate": 1e-3, "fixed_steps": 8}


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """A record a part and loss: the retain loss at equal forgetting, and both losses after equal steps."""
    parts = masks(case)
    steps, rate = settings["fixed_steps"], settings["fixed_rate"]
    config = forgetting.settings_of({**settings, "max_steps": steps, "eval_every": steps}, False)
    choices = [({"choice": name}, partial(parts.__getitem__, name)) for name in parts]
    for row in forgetting.records(case, choices, settings, done):
        # No level ends it early: some parts would take fewer steps than others.
        forget, retain = losses_after(config, case, parts[row["choice"]], row["loss"], rate)[steps]
        yield {
            **row, "fixed_rate": rate, "fixed_steps": steps, "forget_after_fixed": forget, "retain_after_fixed": retain,
        }  # fmt: skip


def masks(case: Case) -> dict[str, Mask]:
    """The whole model, every layer's matrices, and the matrices of every kind over all layers."""
    tensors = [info for info in select_tensors(catalogue(case.model), SCOPE) if info.name.endswith("weight")]
    found = {WHOLE: Mask.whole(case.model, [info.name for info in catalogue(case.model)])}
    for layer in sorted({info.layer for info in tensors}):
        found[f"layer {layer}"] = Mask.whole(case.model, [info.name for info in tensors if info.layer == layer])
    for kind in dict.fromkeys(matrix_kind(info) for info in tensors):
        found[kind] = Mask.whole(case.model, [info.name for info in tensors if matrix_kind(info) == kind])
    return found


def matrix_kind(info: TensorInfo) -> str:
    """What a matrix is called in its layer, such as `mlp.up_proj`; families have their own names."""
    return re.sub(r"^.*?\.\d+\.", "", info.name).removesuffix(".weight")


def summary(records: Sequence[Record]) -> str:
    """Damage at equal forgetting, then both losses after equal steps.

    Kinds of different families have different names and so stand apart.
    """
    losses = list(dict.fromkeys(row["loss"] for row in records))
    rate, steps = records[0]["fixed_rate"], records[0]["fixed_steps"]
    lines = [f"rise of the forget and of the retain loss after {steps} steps at {rate:g}, nats a token", ""]
    lines += ["| mask | " + " | ".join(f"{loss}: {end}" for loss in losses for end in ("forget", "retain")) + " |"]
    lines += ["|---|" + "---|" * (2 * len(losses))]
    for choice in dict.fromkeys(row["choice"] for row in records):
        cells = [rise(records, choice, loss, end) for loss in losses for end in ("forget", "retain")]
        lines.append(f"| {choice} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join([forgetting.table(records, "one part at a time"), "", *lines])


def rise(records: Sequence[Record], choice: str, loss: str, end: str) -> Interval:
    """Of the `forget` or `retain` loss after equal steps, over models, in nats a token."""
    own = [row for row in records if (row["choice"], row["loss"]) == (choice, loss)]
    return interval(finite([row[f"{end}_after_fixed"] - row[f"{end}_start"] for row in own]))


def draw(records: Sequence[Record], path: Path) -> None:
    """A row a part, a panel a loss."""
    losses = list(dict.fromkeys(row["loss"] for row in records))
    choices = [name for name in dict.fromkeys(row["choice"] for row in records) if name != WHOLE]
    figure, axes = panels(losses, 1.6 + 3.0 * len(losses), 1.0 + 0.22 * len(choices), share_y=True)
    axes[0].invert_yaxis()
    for one, loss in zip(axes, losses, strict=True):
        rows = {choice: at_both_levels(records, choice, loss) for choice in choices}
        dots(one, rows, "retain damage over that of the whole model (ratio)")
        one.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    save(figure, path)
