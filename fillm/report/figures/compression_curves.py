"""What a gradient sketch costs in accuracy: error against bytes, and against time."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fillm.report.figures.data import Axis, FigureData, Level, Panel, Series
from fillm.report.runs import Run

Row = dict[str, Any]

# In the order in which they get their styles, whatever is in the file.
KINDS = ("oporp", "countsketch", "sjlt", "gaussian", "rademacher", "factored", "factored-sjlt", "tensorsketch")
METHODS = ("soir", "woodbury", "first-order", "damage")
_ERROR = "median_error"
_LEAST = 1e-9  # an error that a logarithmic axis can show
_ERROR_AXIS = Axis("median relative error of a score", scale="log")
_BYTES = Axis("sketches of the retain set", "bytes", "log")
_TIME = Axis("time of the passes over plain backpropagation", "ratio", "log")
_READING = (
    "a point is a sketch size. Lower left is better. The dashed line is the error of leaving the second-order term out."
)


def compression_curves(runs: Sequence[Run]) -> FigureData | None:
    """Of the first workload of the first compression study, all its retain samples, float32 sketches.

    Two panels a method: the median relative error of the scores over tensors, against the bytes of the retain set's
    sketches and against the time of the passes over that of plain backpropagation.
    """
    workloads = _workloads(runs)
    if not workloads:
        return None
    name, every = next(iter(workloads.items()))
    whole = _whole(every)
    timed = {(row["kind"], row["k"]): row.get("over_plain") for row in every if row["method"] == "timing"}
    panels = []
    for method in METHODS:
        here, levels = _sketches(whole, method)
        for against, axis in (("bytes", _BYTES), ("time", _TIME)):
            points = [(row, _position(row, against, timed)) for row in here]
            series = _series([(row, x) for row, x in points if x is not None])
            if series:
                panels.append(Panel(f"{method}: error against {against}", axis, _ERROR_AXIS, series, levels=levels))
    if not panels:
        return None
    samples = f"{whole[0].get('forget_samples')} forget and {whole[0].get('retain_samples')} retain samples"
    caption = f"Workload {name}, {samples}; {_READING}"
    return FigureData("compression_curves", "Accuracy of compressed rankings", caption, tuple(panels), columns=2)


def compression_workloads(runs: Sequence[Run]) -> FigureData | None:
    """Error against bytes, as in `compression_curves`, a panel a workload of every study; of one method alone.

    None where there is one workload, which `compression_curves` shows in full.
    """
    workloads = {name: _whole(rows) for name, rows in _workloads(runs).items()}
    for method in METHODS:
        panels = []
        for name, rows in workloads.items():
            here, levels = _sketches(rows, method)
            points = [(row, row.get("store_bytes")) for row in here]
            series = _series([(row, x) for row, x in points if x is not None])
            if series:
                panels.append(Panel(name, _BYTES, _ERROR_AXIS, series, levels=levels))
        if len(panels) > 1:
            caption = f"{method} on every workload, all its retain samples; {_READING}"
            title = "Accuracy of compressed rankings by workload"
            return FigureData("compression_workloads", title, caption, tuple(panels), columns=3)
    return None


def _workloads(runs: Sequence[Run]) -> dict[str, list[Row]]:
    """The rows of every workload, by its name; of several studies also by theirs."""
    studies = [run for run in runs if run.command == "compression"]
    found: dict[str, list[Row]] = {}
    for run in studies:
        for row in next(iter(run.tables.values())).to_pylist():
            name = str(row["workload"])
            found.setdefault(f"{name} ({run.name})" if len(studies) > 1 else name, []).append(row)
    return found


def _whole(rows: Sequence[Row]) -> list[Row]:
    """Those of all retain samples."""
    return [row for row in rows if row.get("n") is not None and row["n"] == row.get("retain_samples")]


def _sketches(whole: Sequence[Row], method: str) -> tuple[list[Row], tuple[Level, ...]]:
    """A method's float32 sketches, and the error without any."""
    here = [row for row in whole if row["method"] == method and row.get(_ERROR) is not None]
    levels = tuple(Level(max(row[_ERROR], _LEAST), "|v|/λ alone") for row in here if row["kind"] == "none")[:1]
    return [row for row in here if row["kind"] in KINDS and row["storage"] == "float32"], levels


def _position(row: Row, name: str, timed: dict[tuple[str, int], float | None]) -> float | None:
    if name == "bytes":
        return row.get("store_bytes")
    own = timed.get((row["kind"], row["k"]))
    return row.get("pass_over_plain") if own is None else own


def _series(points: Sequence[tuple[Row, float]]) -> tuple[Series, ...]:
    found = []
    for style, kind in enumerate(KINDS):
        own = sorted(((row, x) for row, x in points if row["kind"] == kind), key=lambda point: point[0]["k"])
        if own:
            x = np.array([x for _, x in own], dtype=np.float64)
            y = np.array([max(row[_ERROR], _LEAST) for row, _ in own])
            labels = tuple(f"{kind}, {row['k']:,} numbers a gradient" for row, _ in own)
            found.append(Series(kind, x, y, style, line=True, labels=labels))
    return tuple(found)
