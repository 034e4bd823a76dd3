"""The figures that studies share: dots with intervals, a row a choice; lines with intervals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.experiment.intervals import Interval
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
    for place, cells in enumerate(rows.values()):
        for name, found in cells:
            style = series.index(name)
            shift = (style - (len(series) - 1) / 2) * 0.8 / max(2, len(series))
            if math.isnan(found.mean):
                continue
            if not math.isnan(found.low):
                axes.plot([found.low, found.high], [place + shift] * 2, color=LIGHT.colour(style), linewidth=1.2)
            axes.plot(found.mean, place + shift, LIGHT.marker(style), color=LIGHT.colour(style), markersize=4,
                      label=name if place == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.set_xlabel(label, fontsize=7)
    if log:
        axes.set_xscale("log")
        # Less than a decade is shown, where matplotlib's own labels of minor ticks run into each other.
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(series) > 1:
        axes.legend(fontsize=7)


def lines(axes: Any, series: Mapping[str, Mapping[float, Interval]], x: str, y: str, log_x: bool = True) -> None:
    """A line a series over numbers, with intervals."""
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
    if log_x:
        axes.set_xscale("log")
    if len(series) > 1:
        axes.legend(fontsize=7)


def save(figure: Figure, path: Path) -> None:
    """As PNG, the same bytes for the same numbers."""
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
