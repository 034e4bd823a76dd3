"""Loss on the forget set against loss on the retain set, of unlearnings."""

from collections.abc import Sequence

import numpy as np

from fillm.report.figures.data import Axis, Panel, Series
from fillm.report.figures.repeats import mean_and_bar, repeats
from fillm.report.labels import labels_of, recipe
from fillm.report.runs import Run
from fillm.unlearn.config import UnlearnConfig

_WIDE = 20.0  # largest over smallest value from which on an axis is logarithmic
Point = tuple[float, float, float]  # step, forget loss, retain loss


def loss_panels(runs: Sequence[Run]) -> list[Panel]:
    """One panel with a line for every group of repeats; none without an unlearning."""
    groups = repeats([run for run in runs if run.command == "unlearn"])
    if not groups:
        return []
    labels = unlearning_labels([group[0] for group in groups])
    series = tuple(
        _series(group, label, style) for style, (group, label) in enumerate(zip(groups, labels, strict=True))
    )
    unit = "nats a token"
    forget, retain = (
        Axis(f"loss on the {name} set", unit, _scale(np.concatenate([getattr(one, axis) for one in series])))
        for name, axis in (("forget", "x"), ("retain", "y"))
    )
    return [Panel("losses", forget, retain, series)]


def unlearning_labels(runs: Sequence[Run]) -> list[str]:
    """What tells unlearnings apart, their ranking by its method; as `labels_of`."""
    shown = [Run(run.path, run.name, run.command, {"settings": recipe(run)}, {}, {}) for run in runs]
    return labels_of(shown, UnlearnConfig, ("loss", "select"))


def measured(run: Run) -> list[Point]:
    """The losses before the first step, at every evaluation before the kept weights, and of the kept weights."""
    told = run.summary
    kept = float(told["kept_step"])
    log = run.tables["log"]
    columns = [log[name].to_pylist() for name in ("step", "forget_loss", "retain_loss")]
    between = [
        (float(step), forget, retain)
        for step, forget, retain in zip(*columns, strict=True)
        if forget is not None and retain is not None and step < kept
    ]
    first, last = (tuple(told[f"{name}_loss"][when] for name in ("forget", "retain")) for when in ("before", "after"))
    return [(0.0, *first), *between, (kept, *last)]


def _series(group: Sequence[Run], label: str, style: int) -> Series:
    paths = [measured(run) for run in group]
    # The last point is of the kept weights, whatever step they are of.
    common = set.intersection(*({step for step, *_ in path[:-1]} for path in paths))
    inner = [[point for point in path[:-1] if point[0] in common] for path in paths]
    values = np.array([[*some, path[-1]] for some, path in zip(inner, paths, strict=True)])  # [runs, points, 3]
    means = [mean_and_bar(values[:, -1, axis]) for axis in (1, 2)]
    x, y = values[:, :, 1].mean(axis=0), values[:, :, 2].mean(axis=0)
    bars = {}
    if len(group) > 1:
        for axis, (mean, bar) in zip("xy", means, strict=True):
            for end, sign in (("low", -1.0), ("high", 1.0)):
                bars[f"{axis}_{end}"] = np.append(np.full(len(x) - 1, np.nan), mean + sign * bar)
    steps = [f"step {step:g}" for step in values[0, :-1, 0]]
    name = f"{label}, {len(group)} runs" if len(group) > 1 else label
    texts = ("before", *steps[1:], "kept") if len(x) > 1 else ("kept",)
    return Series(name, x, y, style, **bars, line=True, labels=tuple(f"{name}: {text}" for text in texts))


def _scale(values: np.ndarray) -> str:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return "log" if low > 0.0 and high / low > _WIDE else "linear"
