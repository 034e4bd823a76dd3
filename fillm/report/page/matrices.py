"""A matrix as what plotly takes: heatmaps, one of them for what the colour scale cannot show."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fillm.report.figures.data import Matrix, Panel, number
from fillm.report.page.scales import Placing
from fillm.report.page.texts import escaped, plain, said

_DARK_SHARE = 0.47  # below it, both colour maps are darker than white on them needs for a contrast of 4 to 1


def matrix_traces(panel: Panel, matrix: Matrix) -> list[dict[str, Any]]:
    """The cells with a place on the colour scale; then, in colours of their own, zeros and infinite ones."""
    values, log = np.asarray(matrix.values, np.float64), matrix.colour.scale in ("log", "symlog")
    placing = Placing.of(matrix.colour.scale, values)
    places = placing.places(np.where(values == 0.0, np.nan, values) if log else values)
    texts = [
        [_cell_hover(panel, matrix, row, column) for column in range(values.shape[1])] for row in range(values.shape[0])
    ]
    hovered = {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>", "xgap": 1, "ygap": 1}
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": [plain(row) for row in places],
        **hovered,
        "hoverongaps": False,
        "colorbar": _colour_bar(matrix, placing, values),
        "meta": {"signed": matrix.low is not None and matrix.low < 0.0},
        **_colour_ends(matrix, placing, values),
    }
    traces = [trace]
    for special, kind in ((values == 0.0) & log, "zero"), (np.isinf(values), "infinite"):
        if special.any():
            marks = [[1.0 if cell else None for cell in row] for row in special]
            traces.append({"type": "heatmap", "z": marks, **hovered, "hoverongaps": False, "showscale": False,
                           "zmin": 0, "zmax": 1, "meta": {"special": kind}})  # fmt: skip
    if matrix.numbers:
        traces.append(_written(values, places, trace["zmin"], trace["zmax"]))
    return traces


def _written(values: np.ndarray, places: np.ndarray, low: float, high: float) -> dict[str, Any]:
    """The values in their cells: white on the dark end of the colours, black on the light one, grey on none."""
    cells = [(row, column) for row in range(values.shape[0]) for column in range(values.shape[1])]
    shares = [(places[cell] - low) / (high - low) for cell in cells]
    colours = ["#808080" if math.isnan(share) else "#ffffff" if share < _DARK_SHARE else "#000000" for share in shares]
    return {"type": "scatter", "mode": "text", "x": [column for _, column in cells], "y": [row for row, _ in cells],
            "text": [_two_decimals(float(values[cell])) for cell in cells], "textfont": {"color": colours},
            "hoverinfo": "skip", "meta": {}}  # fmt: skip


def _two_decimals(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−") if math.isfinite(value) else number(value)


def _cell_hover(panel: Panel, matrix: Matrix, row: int, column: int) -> str:
    where = [said(axis, float(i)) for axis, i in ((panel.y, row), (panel.x, column))]
    return "<br>".join([f"<b>{where[0]}</b>", where[1], said(matrix.colour, float(matrix.values[row, column]))])


def _colour_ends(matrix: Matrix, placing: Placing, values: np.ndarray) -> dict[str, float]:
    low, high = _ends(matrix, values)
    first, last = (float(place) for place in placing.places(np.array([low, high])))
    if matrix.colour.scale == "symlog":
        reach = max(abs(first), abs(last)) or 1.0
        return {"zmin": -reach, "zmax": reach}
    return {"zmin": first, "zmax": last if last > first else first + 1.0}


def _ends(matrix: Matrix, values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if matrix.colour.scale == "log":
        finite = finite[finite > 0.0]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, 10.0)
    return (low if matrix.low is None else matrix.low), (high if matrix.high is None else matrix.high)


def _colour_bar(matrix: Matrix, placing: Placing, values: np.ndarray) -> dict[str, Any]:
    """Without a title, which a small plot would cut; the page has it above."""
    bar: dict[str, Any] = {"thickness": 14}
    places, texts = placing.ticks(*_ends(matrix, values))
    return {**bar, "tickmode": "array", "tickvals": places, "ticktext": texts} if places else bar


def grouped(names: list[str], groups: Sequence[str]) -> list[str]:
    """The name of a group before that of its first row."""
    firsts = [bool(groups) and (i == 0 or groups[i - 1] != groups[i]) for i in range(len(names))]
    return [f"<b>{escaped(groups[i])}</b>  {name}" if firsts[i] else name for i, name in enumerate(names)]


def group_lines(groups: Sequence[str]) -> list[dict[str, Any]]:
    """Lines between rows of different groups."""
    return [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": i - 0.5, "y1": i - 0.5,
         "line": {"width": 1}}
        for i in range(1, len(groups)) if groups[i] != groups[i - 1]
    ]  # fmt: skip
