"""Values to places on an axis or a colour scale, and the ticks that stand there."""

import math
from dataclasses import dataclass

import numpy as np

from fillm.report.figures.data import Scale

_MOST_TICKS = 7
_FACTORS = ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))  # of powers of ten, where these alone are too few
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Placing:
    """How the values of one axis are placed.

    plotly has no symmetric logarithmic axis, and no logarithmic colours; both are drawn on a linear one, at
    log10 |v| above the threshold t of the axis:  sign(v) (1 + log10(|v| / t)) for |v| >= t, v / t below.

    Attributes:
        scale: linear, log or symlog.
        threshold: t, above 0; without meaning for the other scales.
    """

    scale: Scale
    threshold: float = 1.0

    @classmethod
    def of(cls, scale: Scale, values: np.ndarray) -> "Placing":
        """For values of which the smallest magnitude other than 0 becomes the threshold."""
        sizes = np.abs(values[np.isfinite(values) & (values != 0.0)])
        return cls(scale, float(sizes.min()) if sizes.size else 1.0)

    def places(self, values: np.ndarray) -> np.ndarray:
        """Places of values, float64 of the same shape; NaN for what has none (not finite, or not above 0 on `log`)."""
        values = np.asarray(values, np.float64)
        finite = np.where(np.isfinite(values), values, np.nan)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if self.scale == "log":
                return np.log10(np.where(finite > 0.0, finite, np.nan))
            if self.scale == "symlog":
                size = np.abs(finite)
                # The quotient overflows where it is not used, hence the difference of logarithms.
                outside = np.sign(finite) * (1.0 + np.log10(size) - np.log10(self.threshold))
                return np.where(size >= self.threshold, outside, finite / self.threshold)
        return finite

    def ticks(self, low: float, high: float) -> tuple[list[float], list[str]]:
        """Places and texts of round values between two values; none on a linear scale, where plotly finds them."""
        if self.scale == "log":
            return self._log_ticks(low, high)
        if self.scale == "symlog":
            reach = max(abs(low), abs(high), self.threshold)
            powers = self._powers(self.threshold, reach, _MOST_TICKS // 2)
            values = [*(-(10.0**p) for p in reversed(powers)), 0.0, *(10.0**p for p in powers)]
            texts = [*(f"−{power_of_ten(p)}" for p in reversed(powers)), "0", *(power_of_ten(p) for p in powers)]
            kept = [i for i, value in enumerate(values) if low <= value <= high or value == 0.0]
            return [float(self.places(np.array(values[i]))) for i in kept], [texts[i] for i in kept]
        return [], []

    def _log_ticks(self, low: float, high: float) -> tuple[list[float], list[str]]:
        powers = self._powers(low, high, _MOST_TICKS)
        if len(powers) > 2:
            return [float(p) for p in powers], [power_of_ten(p) for p in powers]
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for factors in _FACTORS:
            values = [f * 10.0**p for p in range(first, last + 1) for f in factors]
            values = [value for value in values if low <= value <= high]
            if 3 <= len(values) <= _MOST_TICKS:
                break
        else:
            values = np.linspace(low, high, 3).tolist() if high > low else [low]
        return [math.log10(value) for value in values], [_plain_number(value) for value in values]

    @staticmethod
    def _powers(low: float, high: float, most: int) -> list[int]:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / most))
        return list(range(first, last + 1, step))


def power_of_ten(power: int) -> str:
    """`10⁻³`; 1 and 10 in full."""
    return {0: "1", 1: "10"}.get(power, f"10{str(power).translate(_SUPERSCRIPT)}")


def _plain_number(value: float) -> str:
    """In decimals near 1, else `3·10⁻⁵`."""
    if 1e-3 <= value < 1e4:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    power, factor = power_of_ten(int(exponent)), f"{float(mantissa):.4g}"
    return power if factor == "1" else f"{factor}·{power}"
