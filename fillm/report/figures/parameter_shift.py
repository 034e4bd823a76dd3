"""How far training or unlearning moved the weights, by layer and kind."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fillm.errors import RunFolderError
from fillm.models import KINDS
from fillm.report.figures.data import Axis, FigureData, Panel, Series
from fillm.report.figures.frontier_of_runs import unlearning_labels
from fillm.report.figures.repeats import BARS, mean_and_bar, repeats
from fillm.report.figures.score_heatmap import OUTSIDE
from fillm.report.model_shift import model_shift
from fillm.report.runs import Run
from fillm.runs import RUN_RECORD, read_record

_RELATIVE = Axis("relative shift |Δθ| / |θ|", scale="log")
_ROOT_MEAN_SQUARE = Axis("root mean square shift", "weight", "log")
Cells = Mapping[tuple[str, int], tuple[float, float]]  # (kind, layer) -> sums above and below the fraction bar


def parameter_shift(runs: Sequence[Run]) -> FigureData | None:
    """One panel for every fine-tuning or unlearning and its repeats, and every ranking by `parameter-shift`.

    The relative shift sqrt(sum |after - before|^2 / sum |before|^2) of all tensors of one kind in one layer is measured
    from the two models, where both are still there. Of a ranking whose models are gone, what is drawn is
    sqrt(sum score^2 / number of weights), if its scores are norms of the shift.
    """
    panels: list[Panel] = []
    notes: list[str] = []
    for title, group in _titled(runs):
        measured = [cells for run in group if (cells := _measured(run, notes)) is not None]
        title += f", {len(measured)} runs" if len(measured) > 1 else ""
        if measured:
            panel = _panel(title, measured, _RELATIVE)
        elif _ranks_shift(group[0]):
            panel = _panel(f"{title}, from its scores", [_from_scores(group[0])], _ROOT_MEAN_SQUARE)
        else:
            continue
        if panel.series:
            panels.append(panel)
        else:
            notes.append(f"{title}: no weight has changed.")
    if not panels:
        return None
    caption = (
        "Euclidean norm of the change of all weights of one kind in one layer, over the norm of the weights before; a "
        f"number without a unit. Tensors outside the layers stand at {OUTSIDE}. What is not shown has not changed."
    )
    if any(panel.y is _ROOT_MEAN_SQUARE for panel in panels):
        caption += " Of rankings from their scores: the root mean square of the change, in units of a weight."
    if any(series.y_low is not None for panel in panels for series in panel.series):
        notes.insert(0, BARS)
    caption, columns = " ".join([caption, *notes]), min(2, len(panels))
    return FigureData("parameter_shift", "Shift of the weights by layer", caption, tuple(panels), columns)


def _titled(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """What is drawn in a panel of its own, with a title."""
    unlearned = repeats([run for run in runs if run.command == "unlearn"])
    labels = unlearning_labels([group[0] for group in unlearned])
    trained = repeats([run for run in runs if run.command == "finetune"])
    return [
        *((group[0].name, group) for group in trained),
        *zip(labels, unlearned, strict=True),
        *((run.name, [run]) for run in runs if _ranks_shift(run)),
    ]


def _ranks_shift(run: Run) -> bool:
    """Whether its scores are Euclidean norms of the shift: at element granularity they are sums."""
    if run.command != "rank" or run.summary["method"] != "parameter-shift":
        return False
    return run.summary["granularity"] != "element" and run.settings.get("score") != "mean-abs"


def _models(run: Run) -> tuple[Path, Path, str | None] | None:
    """The folders of the model before and after, and the fingerprint that the one before had."""
    settings, first = run.settings, run.fingerprint("initial_model")
    if settings.get("adapter") is not None:
        return None  # the adapter is merged into the one and not into the other
    if run.command == "unlearn":
        before, after = settings.get("model"), run.path / "model"
    elif run.command == "finetune":
        before, after = settings.get("model"), run.path
    elif _ranks_shift(run):
        before, after, first = settings.get("base_model"), run.place_of(str(settings.get("model"))), None
    else:
        return None
    if before is None or not (folder := run.place_of(str(before))).is_dir() or not after.is_dir():
        return None
    return folder, after, first


def _measured(run: Run, notes: list[str]) -> Cells | None:
    """The sums of one run, None where they cannot be had; what has to be said about them is added to the notes."""
    found = _models(run)
    if found is None:
        return None
    before, after, fingerprint = found
    now = _made_as(before)
    if fingerprint is not None and now is not None and now != fingerprint:
        notes.append(f"{run.name}: not drawn; its base model has been made anew since.")
        return None
    try:
        tensors, alone = model_shift(before, after)
    except RunFolderError as error:
        notes.append(f"{run.name}: not drawn; {error}.")
        return None
    if alone:
        notes.append(f"{run.name}: {len(alone)} tensors are in one of the two models alone and left out.")
    cells: dict[tuple[str, int], tuple[float, float]] = {}
    for tensor in tensors.values():
        above, below = cells.get((tensor.kind, tensor.layer), (0.0, 0.0))
        cells[tensor.kind, tensor.layer] = above + tensor.shift, below + tensor.base
    return cells


def _made_as(folder: Path) -> str | None:
    """The fingerprint in the record of the run that made a model folder, where there is one."""
    record: Any
    for home in (folder, *([folder.parent] if folder.name == "model" else [])):
        try:
            record = read_record(home / RUN_RECORD, "")
            return str(record["fingerprints"]["model"])
        except (RunFolderError, KeyError, TypeError):
            continue
    return None


def _from_scores(run: Run) -> Cells:
    cells: dict[tuple[str, int], tuple[float, float]] = {}
    table = run.tables["ranking"]
    columns = (table[name].to_pylist() for name in ("kind", "layer", "score", "numel"))
    for kind, layer, score, numel in zip(*columns, strict=True):
        above, below = cells.get((kind, layer), (0.0, 0.0))
        cells[kind, layer] = above + score**2, below + numel
    return cells


def _panel(title: str, measured: Sequence[Cells], axis: Axis) -> Panel:
    """Means over the runs; at least one."""
    layers = sorted({layer for cells in measured for _, layer in cells})
    places = [*([-1] if layers and layers[0] < 0 else []), *range(max(layers, default=-1) + 1)]
    series = []
    for style, kind in enumerate(KINDS):
        told = [mean_and_bar([_ratio(cells.get((kind, layer))) for cells in measured]) for layer in places]
        if all(math.isnan(mean) for mean, _ in told):
            continue
        points = [(float(place), mean, bar) for place, (mean, bar) in enumerate(told)]
        if places[0] < 0 and len(points) > 1:
            points.insert(1, (0.0, math.nan, math.nan))  # no line from outside the layers to the first of them
        x, y, bar = (np.array(values) for values in zip(*points, strict=True))
        bars = {} if np.isnan(bar).all() else {"y_low": y - bar, "y_high": y + bar}
        series.append(Series(kind, x, y, style, **bars, line=True))
    categories = tuple(OUTSIDE if layer < 0 else str(layer) for layer in places)
    return Panel(title, Axis("layer", scale="category", categories=categories), axis, tuple(series))


def _ratio(cell: tuple[float, float] | None) -> float:
    """NaN where there is nothing, or nothing that a logarithmic axis can show."""
    if cell is None or cell[0] == 0.0 or cell[1] == 0.0:
        return math.nan
    return math.sqrt(cell[0] / cell[1])
