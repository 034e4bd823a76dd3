"""Ticks of axes: names of categories, thinned and turned as they need; powers of ten without mathematical markup."""

import math
from typing import Any

from fillm.report.figures.data import Axis

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_FONT = 7
_MOST = 34  # categories across that all get a name
_LONG = 4  # characters of a name across from which on it is turned


def power(value: float) -> str:
    """A power of ten as it is written, `10⁻³`; other numbers, and powers close to 1, in decimals."""
    if value == 0.0:
        return "0"
    mantissa, exponent = f"{value:.5e}".split("e")
    if -2 <= int(exponent) <= 3:
        return f"{value:.6g}".replace("-", "−")
    power_of_ten = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    factor = f"{float(mantissa):g}".replace("-", "−")
    return {"1": power_of_ten, "−1": f"−{power_of_ten}"}.get(factor, f"{factor}·{power_of_ten}")


def set_axis(axes: Any, which: str, axis: Axis) -> None:
    """Scale, label and ticks of the x or the y axis of an `Axes` whose data are drawn."""
    from matplotlib.ticker import MaxNLocator

    own = axes.xaxis if which == "x" else axes.yaxis
    least = axes.dataLim.minposx if which == "x" else axes.dataLim.minposy  # infinite where nothing is above 0
    own.set_label_text(axis.text, fontsize=8)
    own.set_tick_params(labelsize=_FONT, length=2)
    if axis.scale == "category":
        _name(axes, which, axis)
    elif axis.scale == "symlog" or (axis.scale == "log" and math.isfinite(least)):
        set_scale = axes.set_xscale if which == "x" else axes.set_yscale
        set_scale(axis.scale, **({"linthresh": 1e-4} if axis.scale == "symlog" else {}))
        set_powers(own, *sorted(own.get_view_interval()))
    elif axis.whole:
        own.set_major_locator(MaxNLocator("auto", integer=True))
    if axis.reverse:
        (axes.invert_xaxis if which == "x" else axes.invert_yaxis)()


def set_powers(own: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis, `own`, that shows values from `low` to `high`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if 0.0 < low < high:
        span = high / low
        if span < 4.0:
            own.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            own.set_minor_locator(MaxNLocator(10))
        else:
            factors = (1.0, 2.0, 3.0, 5.0) if span < 10.0 else (1.0, 3.0) if span < 300.0 else (1.0,)
            own.set_major_locator(LogLocator(subs=factors, numticks=7))
    own.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    own.set_minor_formatter(NullFormatter())


def signed_decades(low: float, high: float) -> list[float]:
    """Ticks of a symmetric logarithmic scale that shows 0 and both signs of `low` to `high`, four a sign at most."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    above = [10.0**exponent for exponent in range(last, first - 1, -max(1, -(-(last - first + 1) // 4)))][::-1]
    return [*(-value for value in reversed(above)), 0.0, *above]


def _name(axes: Any, which: str, axis: Axis) -> None:
    names = axis.categories
    if which == "y":
        axes.set_yticks(range(len(names)), names, fontsize=_FONT)
        return
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**9) if len(names) / step <= _MOST)
    numbers = all(name.isdecimal() for name in names[1:])
    shown = [i for i, name in enumerate(names) if step == 1 or not name.isdecimal() or int(name) % step == 0]
    axes.set_xticks(shown, [names[i] for i in shown], fontsize=_FONT)
    if not numbers and max(map(len, names)) > _LONG:
        axes.tick_params(axis="x", labelrotation=40)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
