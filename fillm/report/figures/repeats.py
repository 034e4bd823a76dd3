"""Runs that repeat one another with other seeds, their mean and their spread."""

import math
from collections.abc import Sequence

import numpy as np

from fillm.report.labels import recipe
from fillm.report.runs import Run

BARS = (
    "Bars: one standard deviation to either side over repeats that differ in seed and model alone (of p-values, of "
    "their logarithms)."
)


def repeats(runs: Sequence[Run]) -> list[list[Run]]:
    """Unlearnings grouped by what they did; the groups come in the order of their first run.

    Two runs with the same recipe, seed and model are no repeats but the same run twice: each stands for itself.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        # Models of different sizes are no repeats of one another.
        key = run.summary.get("parameters"), sorted(recipe(run).items())
        groups.setdefault(repr(key), []).append(run)
    found = []
    for group in groups.values():
        drawn = {repr((run.settings.get("seed"), run.settings.get("model"))) for run in group}
        found += [group] if len(drawn) == len(group) else [[run] for run in group]
    return found


def centre_and_ends(values: Sequence[float], logarithmic: bool) -> tuple[float, float, float]:
    """Mean, and mean minus and plus one standard deviation; for a logarithmic axis of the logarithms of the values."""
    mean, bar = mean_and_bar([math.log(value) for value in values] if logarithmic else values)
    ends = mean, mean - bar, mean + bar
    return tuple(map(math.exp, ends)) if logarithmic else ends


def mean_and_bar(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of the values that are numbers; NaN for what there is none of."""
    good = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    mean = float(good.mean()) if len(good) else math.nan
    return mean, float(good.std(ddof=1)) if len(good) > 1 else math.nan
