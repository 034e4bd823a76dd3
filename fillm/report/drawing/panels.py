"""One panel: series with error bars, or a matrix with its colour bar."""

import math
import textwrap
from typing import Any

import numpy as np

from fillm.report.drawing.ticks import power, set_axis, set_powers, signed_decades
from fillm.report.figures.data import Matrix, Panel, Series, number
from fillm.report.theme import Theme

_TITLE_CHARACTER = 0.075  # inches of a panel's title
_CHARACTER = 0.056  # inches of a tick's text
_ROW = 0.23  # inches of a category down
_MARKERS = 40  # on a line, at most about twice as many
_CELL = 0.5  # inches of a cell with a number in it


def panel_size(panel: Panel) -> tuple[float, float]:
    """Width and height in inches."""
    left = 0.75 + _CHARACTER * max((len(name) for name in panel.y.categories), default=0)
    below = 0.75
    names = panel.x.categories
    if names and not all(name.isdecimal() for name in names[1:]):
        below += 0.65 * _CHARACTER * max(map(len, names))
    if panel.matrix is None:
        height = _ROW * len(panel.y.categories) if panel.y.scale == "category" else 2.3
        return max(left + 3.0, 4.0), max(height, 0.6) + below + 0.3
    rows, columns = panel.matrix.values.shape
    if panel.matrix.numbers:
        return left + max(_CELL * columns, 1.5) + 0.9, max(0.8 * _CELL * rows, 1.2) + below + 0.3
    cell = min(0.5, max(0.16, 9.0 / columns))
    left += _CHARACTER * (3 + max(map(len, panel.matrix.groups), default=0))
    label = _CHARACTER * 1.2 * len(panel.matrix.colour.text)  # beside the colour bar
    return left + max(cell * columns, 2.6) + 1.2, max(_ROW * rows, 1.2, label) + below + 0.3


def draw_panel(panel: Panel, axes: Any, theme: Theme) -> None:
    """Into empty axes of a figure."""
    if panel.matrix is not None:
        _draw_matrix(panel, panel.matrix, axes, theme)
    else:
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for series in panel.series:
            _draw_series(series, axes, theme)
        if not any(np.isfinite(series.x + series.y).any() for series in panel.series):
            axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", fontsize=8, color=theme.quiet)
        for level in panel.levels:
            line = axes.axhline if level.along == "x" else axes.axvline
            line(level.value, color=theme.quiet, linewidth=1.0, linestyle="--", zorder=1)
        for which, axis in (("x", panel.x), ("y", panel.y)):
            if axis.scale == "category":
                limits = axes.set_xlim if which == "x" else axes.set_ylim
                limits(-0.6, len(axis.categories) - 0.4)
            set_axis(axes, which, axis)
    # It begins above the axes, right of their ticks and title.
    room = int((panel_size(panel)[0] - 0.9) / _TITLE_CHARACTER)
    axes.set_title(textwrap.fill(panel.title, room), fontsize=9, loc="left")


def _draw_series(series: Series, axes: Any, theme: Theme) -> None:
    colour = theme.colour(series.style)
    errors = {
        f"{axis}err": np.abs(np.stack([low - centre, high - centre]))
        for axis, centre, low, high in (
            ("x", series.x, series.x_low, series.x_high),
            ("y", series.y, series.y_low, series.y_high),
        )
        if low is not None and high is not None
    }
    axes.errorbar(
        series.x, series.y, **errors, color=colour, ecolor=colour, elinewidth=1.0, capsize=2.5, capthick=1.0,
        markevery=max(1, len(series.x) // _MARKERS) if series.line else 1,
        linewidth=1.2, linestyle=("--" if series.dashed else "-") if series.line else "none",
        marker=theme.marker(series.style), markersize=4.5, markeredgecolor=colour,
        markerfacecolor=theme.ground if series.hollow else colour,
    )  # fmt: skip


def special_cells(matrix: Matrix) -> set[str]:
    """What of `zero`, `infinite` and `none` is among the cells and needs a colour beside the scale."""
    values = matrix.values
    found = {"none"} if np.isnan(values).any() and not matrix.numbers else set()
    if np.isinf(values).any():
        found.add("infinite")
    if matrix.colour.scale in ("log", "symlog") and (values == 0.0).any():
        found.add("zero")
    return found


def colour_range(matrix: Matrix) -> tuple[float, float]:
    """Ends of the colour scale; of equal values a decade around them, or one to either side."""
    values = matrix.values[np.isfinite(matrix.values)]
    if matrix.colour.scale in ("log", "symlog"):
        values = np.abs(values[values != 0.0])
    low = matrix.low if matrix.low is not None else float(values.min()) if len(values) else 1.0
    high = matrix.high if matrix.high is not None else float(values.max()) if len(values) else 1.0
    if high > low * 1.01 or (matrix.colour.scale == "linear" and high > low):
        return low, high
    return (low / 3.0, high * 3.0) if matrix.colour.scale != "linear" else (low - 1.0, high + 1.0)


def _norm(matrix: Matrix) -> Any:
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    low, high = colour_range(matrix)
    if matrix.colour.scale == "symlog":
        return SymLogNorm(low, vmin=-high, vmax=high, base=10)
    return LogNorm(low, high) if matrix.colour.scale == "log" else Normalize(low, high)


def _draw_matrix(panel: Panel, matrix: Matrix, axes: Any, theme: Theme) -> None:
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import FuncFormatter

    values, norm = matrix.values, _norm(matrix)
    logarithmic = matrix.colour.scale in ("log", "symlog")
    shown = np.where(np.isfinite(values) & ~(logarithmic & (values == 0.0)), values, np.nan)
    special = np.where(np.isinf(values), 1.0, np.where(logarithmic & (values == 0.0), 0.0, np.nan))
    signed = matrix.low is not None and matrix.low < 0.0
    colours = matplotlib.colormaps[theme.signed if signed else theme.sequential]
    # Cells are rectangles of the vector picture: an image would be blurred by some viewers.
    edges = np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5
    drawn = {"edgecolors": theme.ground, "linewidth": 0.6}
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(shown), cmap=colours, norm=norm, **drawn)
    axes.pcolormesh(*edges, np.ma.masked_invalid(special), cmap=ListedColormap([theme.zero, theme.infinite]),
                    vmin=0, vmax=1, **drawn)  # fmt: skip
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02, aspect=25)
    scale = {"log": "\nlog scale", "symlog": "\nsymmetric log scale"}.get(matrix.colour.scale, "")
    bar.set_label(matrix.colour.text + scale, fontsize=8)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    if matrix.colour.scale == "log":
        set_powers(bar.ax.yaxis, *colour_range(matrix))
    elif logarithmic:
        bar.set_ticks(signed_decades(*colour_range(matrix)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
        bar.minorticks_off()
    if matrix.numbers:
        _write_numbers(matrix, axes, lambda value: colours(norm(value)), theme)
    set_axis(axes, "x", panel.x)
    set_axis(axes, "y", panel.y)
    axes.spines[:].set_visible(False)
    _part_groups(panel, matrix, axes, theme)


def _write_numbers(matrix: Matrix, axes: Any, colour_of: Any, theme: Theme) -> None:
    for (i, j), value in np.ndenumerate(matrix.values):
        ink = theme.ink
        if math.isfinite(value):
            red, green, blue, _ = colour_of(value)
            ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
        text = f"{round(value, 2) + 0.0:.2f}".replace("-", "−") if math.isfinite(value) else number(float(value))
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)


def _part_groups(panel: Panel, matrix: Matrix, axes: Any, theme: Theme) -> None:
    """A line between rows of different groups; the first row of every group carries its name."""
    groups = matrix.groups
    if not groups:
        return
    names = []
    for i, (group, name) in enumerate(zip(groups, panel.y.categories, strict=True)):
        first = i == 0 or groups[i - 1] != group
        if first and i:
            axes.axhline(i - 0.5, color=theme.ink, linewidth=0.9)
        names.append(f"{group}  |  {name}" if first else name)
    axes.set_yticks(range(len(names)), names, fontsize=7)
