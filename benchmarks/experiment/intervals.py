"""Means over models, with 95 % confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Interval:
    """A mean and how far it may be off.

    Attributes:
        mean: of the values, or their geometric mean.
        low, high: ends of the 95 % confidence interval by Student's t; NaN of a single value.
        count: of the values.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count == 0:
            return "-"
        if math.isnan(self.low):
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def interval(values: Sequence[float], geometric: bool = False) -> Interval:
    """Of values that are independent draws, one a model.

    Args:
        values: finite; above 0 where `geometric`.
        geometric: of their logarithms, and back.
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan, 0)
    drawn = np.log(values) if geometric else np.asarray(values, dtype=np.float64)
    mean, half = float(drawn.mean()), math.nan
    if drawn.size > 1:
        half = float(t.ppf(0.975, drawn.size - 1) * drawn.std(ddof=1) / math.sqrt(drawn.size))
    ends = (mean, mean - half, mean + half)
    return Interval(*(math.exp(end) if geometric else end for end in ends), drawn.size)
