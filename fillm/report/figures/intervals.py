"""Means over models, with 95 % confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHARE = 0.95  # of the draws whose interval holds the mean


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
        half = float(student_t(drawn.size - 1) * drawn.std(ddof=1) / math.sqrt(drawn.size))
    ends = (mean, mean - half, mean + half)
    return Interval(*(math.exp(end) if geometric else end for end in ends), drawn.size)


def student_t(degrees: int) -> float:
    """The t that 95 % of Student's distribution lie within, on either side of 0; a report does without scipy.

    With t = sqrt(n) tan(a), the share within is a finite sum of powers of cos(a) (Abramowitz and Stegun 1964, 26.7.3
    and 26.7.4), which a bisection turns around.

    Args:
        degrees: of freedom, n, at least 1.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, degrees) < _SHARE else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """The share of the distribution between -t and t."""
    cosine, odd = math.cos(angle), degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= power / (power + 1) * cosine**2
    if odd:
        return 2.0 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
