"""The figures that studies share: dots with intervals, a row a choice; lines with intervals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fillm.report.figures.intervals import Interval
from fillm.report.theme import LIGHT


def panels(titles: Sequence[str], width: float, height: float, share_y: bool = False) -> tuple[Figure, list[Any]]:
    """A figure with a panel a title, side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(titles), sharey=share_y, squeeze=False)[0])
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, fontsize=9, loc="left")
        one.grid(color=LIGHT.faint, linewidth=0.6)
        one.set_axisbelow(True)
        one.tick_params(labelsize=7)
    return figure, axes


def dots(axes: Any, rows: Mapping[str, Sequence[tuple[str, Interval]]], label: str, log: bool = True) -> None:
    """A row a name, in it a dot a series with its interval.

    Args:
        axes: of matplotlib.
        rows: name -> (series, interval).
        label: of the horizontal axis, with its unit.
        log: whether that axis is logarithmic.
    """
    series = list(dict.fromkeys(name for cells in rows.values() for name, _ in cells))
    named = set[str]()
    for place, cells in enumerate(rows.values()):
        for name, found in cells:
            style = series.index(name)
            shift = (style - (len(series) - 1) / 2) * 0.8 / max(2, len(series))
            if math.isnan(found.mean):
                continue
            if not math.isnan(found.low):
                axes.plot([found.low, found.high], [place + shift] * 2, color=LIGHT.colour(style), linewidth=1.2)
            axes.plot(found.mean, place + shift, LIGHT.marker(style), color=LIGHT.colour(style), markersize=4,
                      label=None if name in named else name)  # fmt: skip
            named.add(name)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.set_xlabel(label, fontsize=7)
    if log:
        axes.set_xscale("log")
        _plain_numbers(axes)
    if len(named) > 1:
        axes.legend(fontsize=7)


def _plain_numbers(axes: Any) -> None:
    """0.5 and 2 instead of powers of ten; between these only where less than a decade and a half is shown."""
    low, high = axes.get_xlim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain if high < 30.0 * low else NullFormatter())
    if high < 30.0 * low:
        axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 3.0, 5.0)))
    axes.tick_params(axis="x", which="both", labelsize=7)


def lines(axes: Any, series: Mapping[str, Mapping[float, Interval]], x: str, y: str, legend: bool = True) -> None:
    """A line a series over numbers, with intervals; the numbers on a logarithmic scale, a tick each."""
    for style, (name, points) in enumerate(series.items()):
        places = sorted(points)
        means = [points[place].mean for place in places]
        axes.plot(places, means, marker=LIGHT.marker(style), color=LIGHT.colour(style), markersize=4, linewidth=1.2,
                  label=name)  # fmt: skip
        ends = [(place, points[place]) for place in places if not math.isnan(points[place].low)]
        axes.vlines([place for place, _ in ends], [one.low for _, one in ends], [one.high for _, one in ends],
                    color=LIGHT.colour(style), linewidth=1.0)  # fmt: skip
    axes.set_xlabel(x, fontsize=7)
    axes.set_ylabel(y, fontsize=7)
    axes.set_xscale("log")
    ticks = sorted({place for points in series.values() for place in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    if legend and len(series) > 1:
        axes.legend(fontsize=7)


def save(figure: Figure, path: Path) -> None:
    """As PNG, the same bytes for the same numbers."""
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
