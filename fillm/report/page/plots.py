"""The panels of a figure as what plotly takes: plain mappings; colours come later, with the theme that is shown."""

import math
import textwrap
from typing import Any

import numpy as np

from fillm.report.figures.data import Axis, Level, Panel, Series, number
from fillm.report.page.matrices import group_lines, grouped, matrix_traces
from fillm.report.page.scales import Placing
from fillm.report.page.texts import SHORT_TICK, escaped, last_part, plain, said, shortened

_ROW = 22  # pixels of a row of a matrix
_MOST_WHOLE = 12  # ticks at every whole number
_SPOKEN = 500  # points of a series that each say everything when pointed at; of more, x and y alone
_MARKERS = 40  # on a line
_TOOLS = 32  # pixels above a plot, for the buttons that would else lie on it
_LINE = 38  # characters of an axis's title that a telephone has room for
_SHORT_LINE = 24  # beside which names of categories take the width
_HEIGHT = 380  # pixels of a panel of series


def panel_plot(panel: Panel) -> dict[str, Any]:
    """Traces and layout of a panel, ready to be written as JSON.

    Every name is escaped for plotly, which reads tags and entities in texts. Series carry their style as a number, and
    category axes all their categories: colours and the choice of ticks are left to the page, which knows its theme and
    its width.

    Args:
        panel: a matrix or series.

    Returns:
        `traces` and `layout` for `Plotly.react`, and `height` in pixels.
    """
    values = {axis: _values(panel, axis) for axis in ("x", "y")}
    placings = {
        "x": Placing.of(panel.x.scale, values["x"]),
        "y": Placing.of(panel.y.scale, values["y"]),
    }
    levels = [level for level in panel.levels if _has_place(level, placings)]
    layout: dict[str, Any] = {
        "xaxis": _axis(panel.x, placings["x"], values["x"], _SHORT_LINE if panel.y.categories else _LINE),
        "yaxis": _axis(panel.y, placings["y"], values["y"], _LINE),
        "margin": {"l": 8, "r": 8, "t": _TOOLS, "b": 8},
        "hovermode": "closest",
        "showlegend": False,
        "shapes": [_line(level, placings) for level in levels],
        "annotations": [_line_label(level, placings) for level in levels if level.label],
    }
    if panel.matrix is not None:
        layout["meta"] = {"short": [escaped(last_part(name)) for name in panel.y.categories]}
        layout["yaxis"]["ticktext"] = grouped(layout["yaxis"]["ticktext"], panel.matrix.groups)
        layout["shapes"] += group_lines(panel.matrix.groups)
        rows, longest = len(panel.y.categories), max((len(shortened(name)) for name in panel.x.categories), default=0)
        height = max(_ROW * rows, 120) + 80 + _TOOLS + (5 * longest if longest > 4 else 0)
        return {"traces": matrix_traces(panel, panel.matrix), "layout": {**layout, "height": height}, "height": height}
    traces = [_series(series, panel, placings) for series in panel.series]
    if not any(np.isfinite(np.asarray(series.x) + np.asarray(series.y)).any() for series in panel.series):
        layout["annotations"].append({"text": "nothing to show", "showarrow": False, "xref": "paper", "yref": "paper",
                                      "x": 0.5, "y": 0.5})  # fmt: skip
    if panel.y.categories:
        layout["meta"] = {"short": [escaped(shortened(name, SHORT_TICK)) for name in panel.y.categories]}
    height = max(_HEIGHT, _ROW * len(panel.y.categories) + 80 + _TOOLS)
    return {"traces": traces, "layout": {**layout, "height": height}, "height": height}


def _values(panel: Panel, axis: str) -> np.ndarray:
    """Every finite value that has to find room on an axis, error bars and levels included."""
    found = [np.zeros(0)]
    for series in panel.series:
        ends = (getattr(series, f"{axis}{end}") for end in ("", "_low", "_high"))
        found += [np.asarray(end, np.float64) for end in ends if end is not None]
    # `along` says along which axis the line runs; its value is one of the other.
    found += [np.array([level.value]) for level in panel.levels if (level.along == "x") == (axis == "y")]
    values = np.concatenate(found)
    return values[np.isfinite(values)]


def _axis(axis: Axis, placing: Placing, values: np.ndarray, line: int) -> dict[str, Any]:
    title = "<br>".join(map(escaped, textwrap.wrap(axis.text, line)))
    told: dict[str, Any] = {"title": {"text": title, "standoff": 8}, "automargin": True}
    if axis.scale == "category":
        count = len(axis.categories)
        ends = [-0.5, count - 0.5]
        told |= {"tickmode": "array", "tickvals": list(range(count)), "range": ends[::-1] if axis.reverse else ends,
                 "ticktext": [escaped(shortened(name)) for name in axis.categories], "showgrid": False,
                 "zeroline": False, "minallowed": -0.5, "maxallowed": count - 0.5}  # fmt: skip
        return told
    told["tickangle"] = 0  # numbers that turn and turn back never find their margin in a narrow plot
    if axis.reverse:
        told["autorange"] = "reversed"
    if axis.scale == "log":
        told |= {"type": "log", "exponentformat": "power", "dtick": _whole_powers(values)}
    elif axis.scale == "symlog" and values.size:
        places, texts = placing.ticks(float(values.min()), float(values.max()))
        told |= {"tickmode": "array", "tickvals": places, "ticktext": texts}
    elif axis.whole and values.size:
        told |= {"tickformat": ",d", "dtick": 1 if values.max() - values.min() <= _MOST_WHOLE else None}
    return {key: value for key, value in told.items() if value is not None}


def _whole_powers(values: np.ndarray) -> int | None:
    """Ticks at powers of ten alone where there are several of them."""
    positive = values[values > 0.0]
    if not positive.size:
        return None
    decades = math.log10(float(positive.max())) - math.log10(float(positive.min()))
    return max(1, math.ceil(decades / 8)) if decades > 2 else None


def _place(axis: Axis, placing: Placing, values: np.ndarray) -> list[float | None]:
    """What plotly is given for values: it takes the logarithm of a `log` axis itself."""
    values = np.asarray(values, np.float64)
    if axis.scale == "symlog":
        return plain(placing.places(values))
    return plain(np.where(values > 0.0, values, np.nan) if axis.scale == "log" else values)


def _series(series: Series, panel: Panel, placings: dict[str, Placing]) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if series.line else "markers",
        "name": escaped(series.name),
        "x": _place(panel.x, placings["x"], series.x),
        "y": _place(panel.y, placings["y"], series.y),
        "line": {"dash": "dash" if series.dashed else "solid", "width": 2},
        "marker": {"size": 9, **({"maxdisplayed": _MARKERS} if series.line and len(series.x) > _MARKERS else {})},
        "meta": {"style": series.style, "hollow": series.hollow, "name": series.name},
    }
    if len(series.x) <= _SPOKEN:
        trace["hovertext"] = [_hover(series, panel, i) for i in range(len(series.x))]
        trace["hovertemplate"] = "%{hovertext}<extra></extra>"
    for axis in ("x", "y"):
        bars = _bars(series, getattr(panel, axis), placings[axis], axis)
        if bars is not None:
            trace[f"error_{axis}"] = bars
    return trace


def _bars(series: Series, axis: Axis, placing: Placing, name: str) -> dict[str, Any] | None:
    """Lengths of error bars; a bar that would reach 0 or below on a logarithmic axis ends at its point."""
    low, high = getattr(series, f"{name}_low"), getattr(series, f"{name}_high")
    if low is None and high is None:
        return None
    middle = np.array([math.nan if v is None else v for v in _place(axis, placing, getattr(series, name))])

    def lengths(end: np.ndarray | None, sign: int) -> list[float]:
        if end is None:
            return [0.0] * len(middle)
        places = np.array([math.nan if v is None else v for v in _place(axis, placing, end)])
        return [float(max(0.0, v)) if math.isfinite(v) else 0.0 for v in sign * (places - middle)]

    return {"type": "data", "symmetric": False, "array": lengths(high, 1), "arrayminus": lengths(low, -1),
            "thickness": 1.5, "width": 4}  # fmt: skip


def _hover(series: Series, panel: Panel, index: int) -> str:
    lines = [f"<b>{escaped(series.name)}</b>"]
    if series.labels:
        lines.append(escaped(series.labels[index]))
    for name in ("x", "y"):
        axis, value = getattr(panel, name), float(getattr(series, name)[index])
        text = said(axis, value)
        ends = [getattr(series, f"{name}{end}") for end in ("_low", "_high")]
        if all(end is not None and math.isfinite(end[index]) for end in ends):
            text += f" [{number(float(ends[0][index]))}, {number(float(ends[1][index]))}]"
        lines.append(text)
    return "<br>".join(lines)


def _line(level: Level, placings: dict[str, Placing]) -> dict[str, Any]:
    across, along = ("y", "x") if level.along == "x" else ("x", "y")
    place = _level_place(level, placings[across])
    return {"type": "line", f"{along}ref": "paper", f"{along}0": 0, f"{along}1": 1, f"{across}ref": across,
            f"{across}0": place, f"{across}1": place, "line": {"width": 1.5, "dash": "dot"}}  # fmt: skip


def _line_label(level: Level, placings: dict[str, Placing]) -> dict[str, Any]:
    across, along = ("y", "x") if level.along == "x" else ("x", "y")
    place = _level_place(level, placings[across])
    # Annotations, unlike shapes, are placed by the logarithm.
    if placings[across].scale == "log":
        place = math.log10(place)
    # At the end of a line across, above one upright, where no point is.
    return {"text": escaped(level.label), "showarrow": False, f"{along}ref": "paper", along: 1,
            f"{across}ref": across, across: place, "yanchor": "bottom",
            "xanchor": "right" if along == "x" else "left", "font": {"size": 11}}  # fmt: skip


def _has_place(level: Level, placings: dict[str, Placing]) -> bool:
    placing = placings["y" if level.along == "x" else "x"]
    return math.isfinite(float(placing.places(np.array(level.value))))


def _level_place(level: Level, placing: Placing) -> float:
    return float(placing.places(np.array(level.value))) if placing.scale == "symlog" else level.value
