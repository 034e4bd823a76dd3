"""The page of a picture: its size, its title, its grid of panels, its legend."""

import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fillm.errors import UsageError
from fillm.report.drawing.panels import draw_panel, panel_size, special_cells
from fillm.report.drawing.table import TITLE_CHARACTER, draw_table
from fillm.report.figures.data import FigureData, Panel
from fillm.report.theme import Theme

_DOTS_PER_INCH = 150
_PAGE = 17.0  # inches across, beyond which panels stand below one another
_LEGEND_FONT = 7
_CHARACTER = 0.058  # inches of a legend's text
_SYMBOL = 0.55  # inches of a legend's symbol and gaps


def draw(data: FigureData, file: str | os.PathLike[str] | IO[bytes], theme: Theme, kind: str | None = None) -> None:
    """Draws a figure with matplotlib; no display is needed and a person's own matplotlibrc changes nothing.

    Args:
        data: what to draw.
        file: what to write; by its name `.png` or `.svg`. An SVG keeps its text as text.
        theme: its colours.
        kind: `png` or `svg` where `file` has no name.

    Raises:
        UsageError: of another format, or of a figure with neither panels nor a table.
    """
    kind = kind or Path(str(file)).suffix.removeprefix(".")
    if kind not in ("png", "svg"):
        raise UsageError(f"{file}: a picture is .png or .svg")
    if not data.panels and data.table is None:
        raise UsageError(f"{data.name}: a figure needs panels or a table")
    with _settings(theme):
        figure = _figure(data, theme) if data.table is None else draw_table(data.title, data.table, theme)
        plain = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
        figure.savefig(file, format=kind, dpi=_DOTS_PER_INCH, metadata=plain, facecolor=theme.ground)


@contextmanager
def _settings(theme: Theme) -> Iterator[None]:
    import matplotlib

    chosen = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))}
    chosen |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "fillm",  # else the ids inside differ from run to run
        "text.parse_math": False,  # a name may hold a dollar sign
        "axes.facecolor": theme.ground,
        "figure.facecolor": theme.ground,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.quiet,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.faint,
        "legend.labelcolor": theme.ink,
    }
    with matplotlib.rc_context(chosen), warnings.catch_warnings():
        # A run may be called in letters that the font lacks: a box in their place is no reason to stop.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _figure(data: FigureData, theme: Theme) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widest = max(panel_size(panel)[0] for panel in data.panels)
    grid = _grid(data.panels, max(1, min(data.columns, int(_PAGE / widest))))
    columns = max(map(len, grid))
    sizes = [[panel_size(panel) for panel in row] for row in grid]
    widths = [max(row[i][0] for row in sizes if i < len(row)) for i in range(columns)]
    heights = [max(height for _, height in row) for row in sizes]
    handles = _handles(data, theme)
    across, deep = _legend_grid([handle.get_label() for handle in handles], sum(widths))
    legend = 0.17 * deep + 0.15 if handles else 0.0
    title = textwrap.wrap(data.title, int((sum(widths) - 0.2) / TITLE_CHARACTER))
    above = 0.2 + 0.2 * max(1, len(title))
    figure = Figure(figsize=(sum(widths), sum(heights) + legend + above), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.03)
    axes = figure.subplots(len(grid), columns, squeeze=False, width_ratios=widths, height_ratios=heights)
    for i, row in enumerate(axes):
        for j, one in enumerate(row):
            if j < len(grid[i]):
                draw_panel(grid[i][j], one, theme)
            else:
                one.set_axis_off()
    figure.suptitle("\n".join(title), fontsize=11, fontweight="bold", x=0.01, ha="left")
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=across, fontsize=_LEGEND_FONT, frameon=False)
    return figure


def _grid(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """Rows of the grid, `columns` panels in each at most."""
    rows: list[list[Panel]] = []
    for panel in panels:
        if not rows or panel.new_row or len(rows[-1]) == columns:
            rows.append([])
        rows[-1].append(panel)
    return rows


def _legend_grid(texts: list[str], width: float) -> tuple[int, int]:
    """Columns and rows of a legend that fits into a width in inches."""
    if not texts:
        return 1, 0
    widest = max(map(len, texts)) * _CHARACTER + _SYMBOL
    across = max(1, min(len(texts), int((width - 0.2) / widest)))
    return across, math.ceil(len(texts) / across)


def _handles(data: FigureData, theme: Theme) -> list[Any]:
    """Symbols of series, of reference lines and of cells that the colour scale cannot show."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    legend = data.legend
    if len(legend) > 1 or any(series.name for series in legend.values()):
        for name, series in legend.items():
            colour = theme.colour(series.style)
            handles.append(
                Line2D([], [], color=colour, marker=theme.marker(series.style), markersize=4.5, linewidth=1.2,
                       linestyle=("--" if series.dashed else "-") if series.line else "none",
                       markerfacecolor=theme.ground if series.hollow else colour, label=name)
            )  # fmt: skip
    for label in dict.fromkeys(level.label for panel in data.panels for level in panel.levels):
        handles.append(Line2D([], [], color=theme.quiet, linewidth=1.0, linestyle="--", label=label))
    cells = [special_cells(panel.matrix) for panel in data.panels if panel.matrix is not None]
    for name, colour in (("zero", theme.zero), ("infinite", theme.infinite), ("none", theme.absent)):
        if any(name in found for found in cells):
            text = {"none": "no such tensor" if data.name == "score_heatmap" else "not known"}.get(name, name)
            handles.append(Patch(facecolor=colour, edgecolor=theme.quiet, label=text))
    return handles
