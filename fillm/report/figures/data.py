"""What a figure shows, as plain numbers: matplotlib and plotly draw from the same of these."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Scale = Literal["linear", "log", "symlog", "category"]
Cell = str | int | float | None


@dataclass(frozen=True)
class Axis:
    """An axis, or what a colour stands for.

    Attributes:
        label: what is measured, in words.
        unit: its unit; empty for a number without one, and for categories.
        scale: `symlog` is linear next to zero and logarithmic beyond.
        categories: of a `category` axis, in order; the values on it are indices into them.
        reverse: whether the first category, or the smallest value, stands at the top (of the x axis: to the right).
        whole: whether only whole numbers have a meaning.
    """

    label: str
    unit: str = ""
    scale: Scale = "linear"
    categories: tuple[str, ...] = ()
    reverse: bool = False
    whole: bool = False

    @property
    def text(self) -> str:
        """`label (unit)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Series:
    """Points, joined by a line or not.

    Attributes:
        name: in the legend. Series of one name look the same in every panel.
        x, y: float64 [N]; a NaN interrupts the line.
        style: which colour and marker; a theme has as many as `fillm.report.theme.STYLES`.
        x_low, x_high, y_low, y_high: ends of the error bars, float64 [N]; None for none. NaN leaves out one bar.
        line: whether the points are joined.
        dashed: whether that line is dashed.
        hollow: whether the markers are.
        labels: a line of text a point, or none at all.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: int = 0
    x_low: np.ndarray | None = None
    x_high: np.ndarray | None = None
    y_low: np.ndarray | None = None
    y_high: np.ndarray | None = None
    line: bool = False
    dashed: bool = False
    hollow: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """A colour a cell. Its rows are the categories of the panel's y axis, its columns those of the x axis.

    Attributes:
        values: float64 [R, C]; NaN where there is nothing, infinite where the value is.
        colour: what a colour stands for.
        low, high: ends of the colour scale; None for the smallest and largest finite value (on a logarithmic scale of
            those above 0).
        numbers: whether the value is written into its cell.
        groups: of every row, what it belongs to; neighbours of different groups are parted by a line. Or empty.
    """

    values: np.ndarray
    colour: Axis
    low: float | None = None
    high: float | None = None
    numbers: bool = False
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Level:
    """A straight line across a panel at one value of `y` (`along == "x"`) or of `x` (`along == "y"`)."""

    value: float
    label: str
    along: Literal["x", "y"] = "x"


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a matrix, or series; `new_row` begins a row of the grid."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...] = ()
    matrix: Matrix | None = None
    levels: tuple[Level, ...] = ()
    new_row: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table: numbers stand to the right and are sorted as numbers."""

    label: str
    unit: str = ""
    numeric: bool = True

    @property
    def text(self) -> str:
        """`label (unit)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


WIDEST_TABLE = 7  # columns beyond which a table is turned on its side where it cannot be scrolled


@dataclass(frozen=True)
class Table:
    """Rows of values, one a column; None is shown as a dash.

    Attributes:
        columns: what they hold.
        rows: the values.
        notes: what has to be said about single values, a line each.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FigureData:
    """A figure: panels in a grid, or a table.

    Attributes:
        name: the stem of its files.
        title: above it.
        caption: below it, in plain words: what is shown, of how many runs, what the bars are.
        panels: in reading order.
        columns: at most so many panels in a row of the grid.
        table: in the place of panels.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...] = field(default=())
    columns: int = 1
    table: Table | None = None

    @property
    def legend(self) -> dict[str, Series]:
        """The first series of every name, in the order in which they come; levels and matrices need no legend."""
        found: dict[str, Series] = {}
        for panel in self.panels:
            for series in panel.series:
                found.setdefault(series.name, series)
        return found


def abreast(panels: Sequence[Panel], most: int) -> int:
    """Panels in a row of a grid: three, two where names of categories down take half of the width, or `most`."""
    return min(most, 2 if any(panel.y.categories for panel in panels) else 3)


def number(value: Cell, digits: int = 4) -> str:
    """A value as it is shown to a person: significant digits, thousands parted in whole numbers, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if np.isnan(value):
        return "–"
    text = f"{value:#.{digits}g}".removesuffix(".")
    return text.replace("inf", "∞")
