"""A figure as a section of the page: plots, the still picture in their place, and the numbers behind them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from fillm.report.drawing.panels import special_cells
from fillm.report.figures.data import WIDEST_TABLE, Axis, FigureData, Panel, Series
from fillm.report.figures.data import Table as FigureTable
from fillm.report.page.looks import glyph, mark_colour, special_colour
from fillm.report.page.plots import panel_plot
from fillm.report.page.stills import Still, stills
from fillm.report.page.tables import Column, PageTable, column_cells, matrix_table, page_table
from fillm.report.page.texts import colour_text

_WIDE = 20  # columns of a matrix
_ABREAST = 5  # rows of a table that stand side by side on paper, where it is turned


@dataclass(frozen=True)
class Plot:
    """One panel.

    Attributes:
        id: of its element.
        title: above it; empty where the figure's will do.
        colour: what the colours of a matrix stand for, or empty.
        height: in pixels.
        json: what plotly draws, safe inside a script element.
        new_row: whether it begins a row.
    """

    id: str
    title: str
    colour: str
    height: int
    json: Markup
    new_row: bool = False


@dataclass(frozen=True)
class CellEntry:
    """A colour of cells that the colour scale cannot show; CSS."""

    name: str
    colour: str


@dataclass(frozen=True)
class LegendEntry:
    """A button that shows and hides the series of one name in every panel."""

    name: str
    colour: str
    glyph: Markup


@dataclass(frozen=True)
class FigureSection:
    """What the template asks of a figure: no `plots` for a table, and `paper` where that is too wide for print."""

    id: str
    title: str
    caption: str
    table: PageTable
    columns: int = 1
    stills: list[Still] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    legend: list[LegendEntry] = field(default_factory=list)
    cells: list[CellEntry] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    paper: list[PageTable] = field(default_factory=list)


def figure_section(figure: FigureData, number: int) -> FigureSection:
    """The section of a figure.

    Args:
        figure: panels or a table.
        number: its place on the page, from 1; ids are made of it.
    """
    name = f"figure-{number}"
    if figure.table is not None:
        table = _of_table(figure.table, figure.title)
        paper = table.turned(_ABREAST) if len(table.columns) > WIDEST_TABLE else []
        return FigureSection(name, figure.title, figure.caption, table, notes=figure.table.notes, paper=paper)
    named = len(figure.panels) > 1 or any(panel.title != figure.title for panel in figure.panels)
    plots = []
    for i, panel in enumerate(figure.panels, 1):
        plot: dict[str, Any] = panel_plot(panel)
        json = Markup(htmlsafe_json_dumps(plot, allow_nan=False, separators=(",", ":")))
        colour = "" if panel.matrix is None else colour_text(panel.matrix)
        plots.append(
            Plot(f"{name}-plot-{i}", panel.title if named else "", colour, plot["height"], json, panel.new_row)
        )
    shown = figure.legend.values() if any(figure.legend) else ()
    return FigureSection(
        name,
        figure.title,
        figure.caption,
        _numbers(figure),
        columns=_columns(figure),
        stills=stills(figure),
        plots=plots,
        legend=[LegendEntry(series.name, mark_colour(series), glyph(series)) for series in shown],
        cells=_special_cells(figure),
    )


def _columns(figure: FigureData) -> int:
    """Panels in a row; a matrix with many columns has one to itself."""
    widest = max(len(panel.x.categories) if panel.matrix is not None else 0 for panel in figure.panels)
    return 1 if widest > _WIDE else max(1, min(figure.columns, len(figure.panels)))


def _special_cells(figure: FigureData) -> list[CellEntry]:
    matrices = [panel.matrix for panel in figure.panels if panel.matrix is not None]
    found = {name for matrix in matrices for name in special_cells(matrix)}
    return [CellEntry(name, special_colour(name)) for name in ("zero", "infinite") if name in found]


def _of_table(table: FigureTable, title: str) -> PageTable:
    columns = [Column(column.text, column.numeric) for column in table.columns]
    cells = [column_cells([row[i] for row in table.rows], column.numeric) for i, column in enumerate(table.columns)]
    return PageTable(title, columns, [list(row) for row in zip(*cells, strict=True)], len(table.rows))


def _numbers(figure: FigureData) -> PageTable:
    """What the panels show, as one table."""
    title = f"Numbers of: {figure.title}"
    matrices = [panel for panel in figure.panels if panel.matrix is not None]
    if len(figure.panels) == 1 and matrices:
        panel = matrices[0]
        return matrix_table(title, panel.y.text, panel.x.categories, panel.y.categories, panel.matrix.values)
    rows = [row for panel in figure.panels for row in (_cells(panel) if panel.matrix is not None else _points(panel))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = {name: pa.array([row.get(name) for row in rows]) for name in names}
    return page_table(pa.table(arrays), title, most=len(rows))


def _cells(panel: Panel) -> list[dict[str, Any]]:
    assert panel.matrix is not None
    values = panel.matrix.values
    return [
        {"panel": panel.title, panel.y.text: down, panel.x.text: across, panel.matrix.colour.text: float(values[i, j])}
        for i, down in enumerate(panel.y.categories)
        for j, across in enumerate(panel.x.categories)
        if not np.isnan(values[i, j])
    ]


def _points(panel: Panel) -> list[dict[str, Any]]:
    rows = []
    for series in panel.series:
        for i in range(len(series.x)):
            row: dict[str, Any] = {"panel": panel.title, "series": series.name}
            if series.labels:
                row["point"] = series.labels[i]
            row |= {**_coordinate(panel.x, series, "x", i), **_coordinate(panel.y, series, "y", i)}
            rows.append(row)
    return rows


def _coordinate(axis: Axis, series: Series, name: str, index: int) -> dict[str, Any]:
    values: Sequence[float] = getattr(series, name)
    if axis.scale == "category":
        place = round(float(values[index])) if np.isfinite(values[index]) else -1
        return {axis.text: axis.categories[place] if 0 <= place < len(axis.categories) else None}
    told = {axis.text: float(values[index])}
    for end in ("low", "high"):
        bound = getattr(series, f"{name}_{end}")
        if bound is not None:
            told[f"{axis.text}, {end}"] = float(bound[index])
    return told
