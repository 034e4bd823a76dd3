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


def compression_curves(runs: Sequence[Run]) -> FigureData | None:
    """Of the first workload of the first compression study, all its retain samples, float32 sketches.

    Two panels a method: the median relative error of the scores over tensors, against the bytes of the retain set's
    sketches and against the time of the passes over that of plain backpropagation.
    """
    studies = [run for run in runs if run.command == "compression"]
    if not studies:
        return None
    every = next(iter(studies[0].tables.values())).to_pylist()
    workload = every[0]["workload"]
    rows = [row for row in every if row["workload"] == workload]
    whole = [row for row in rows if row.get("n") is not None and row["n"] == row.get("retain_samples")]
    timed = {(row["kind"], row["k"]): row.get("over_plain") for row in rows if row["method"] == "timing"}
    panels = []
    for method in METHODS:
        here = [row for row in whole if row["method"] == method and row.get(_ERROR) is not None]
        levels = tuple(Level(max(row[_ERROR], _LEAST), "|v|/λ alone") for row in here if row["kind"] == "none")[:1]
        here = [row for row in here if row["kind"] in KINDS and row["storage"] == "float32"]
        if not here:
            continue
        error = Axis("median relative error of a score", scale="log")
        for name, axis in (
            ("bytes", Axis("sketches of the retain set", "bytes", "log")),
            ("time", Axis("time of the passes over plain backpropagation", "ratio", "log")),
        ):
            points = [(row, _position(row, name, timed)) for row in here]
            series = _series([(row, x) for row, x in points if x is not None])
            if series:
                panels.append(Panel(f"{method}: error against {name}", axis, error, series, levels=levels))
    if not panels:
        return None
    others = sorted({row["workload"] for row in every} - {workload})
    samples = f"{whole[0].get('forget_samples')} forget and {whole[0].get('retain_samples')} retain samples"
    caption = (
        f"Workload {workload}, {samples}; a point is a sketch size. Lower left is better. The dashed line is the error "
        "of leaving the second-order term out."
        + (f" The file also has {', '.join(others)}, which are not drawn." if others else "")
    )
    return FigureData("compression_curves", "Accuracy of compressed rankings", caption, tuple(panels), columns=2)


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
