"""How far training or unlearning moved the weights, by layer and kind."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fillm.errors import RunFolderError
from fillm.models import KINDS
from fillm.report.figures.data import Axis, FigureData, Panel, Series
from fillm.report.figures.score_heatmap import OUTSIDE
from fillm.report.model_shift import model_shift
from fillm.report.runs import Run
from fillm.runs import RUN_RECORD

_RELATIVE = Axis("relative shift |Δθ| / |θ|", scale="log")
_ROOT_MEAN_SQUARE = Axis("root mean square shift", "weight", "log")
Cells = Mapping[tuple[str, int], tuple[float, float]]  # (kind, layer) -> sums above and below the fraction bar


def parameter_shift(runs: Sequence[Run]) -> FigureData | None:
    """One panel for every fine-tuned or unlearned model, and every ranking by `parameter-shift`; None without one.

    The relative shift sqrt(sum |after - before|^2 / sum |before|^2) of all tensors of one kind in one layer is measured
    from the two models, where both are still there. Of a ranking whose models are gone, what is drawn is
    sqrt(sum score^2 / number of weights), if its scores are norms of the shift.
    """
    panels, notes = [], []
    for run in runs:
        panel = None
        pair = _models(run)
        if pair is not None:
            panel, note = _measured(run, *pair)
            notes += [note] if note else []
        if panel is None and _ranks_shift(run):
            panel = _panel(f"{run.name}, from its scores", _from_scores(run), _ROOT_MEAN_SQUARE)
        if panel is not None:
            panels.append(panel)
    if not panels:
        return None
    caption = (
        "Euclidean norm of the change of all weights of one kind in one layer, over the norm of the weights before; a "
        f"number without a unit. Tensors outside the layers stand at {OUTSIDE}. What is not shown has not changed."
    )
    return FigureData(
        "parameter_shift", "Shift of the weights by layer", " ".join([caption, *notes]), tuple(panels),
        columns=min(2, len(panels)),
    )  # fmt: skip


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
        before, after, first = settings.get("base_model"), Path(str(settings.get("model"))), None
    else:
        return None
    if before is None or not Path(before).is_dir() or not after.is_dir():
        return None
    return Path(before), after, first


def _measured(run: Run, before: Path, after: Path, fingerprint: str | None) -> tuple[Panel | None, str]:
    """The panel, and what has to be said about it."""
    now = _made_as(before)
    if fingerprint is not None and now is not None and now != fingerprint:
        return None, f"{run.name}: not drawn; its base model has been made anew since."
    try:
        tensors, alone = model_shift(before, after)
    except RunFolderError as error:
        return None, f"{run.name}: not drawn; {error}."
    cells: dict[tuple[str, int], tuple[float, float]] = {}
    for tensor in tensors.values():
        above, below = cells.get((tensor.kind, tensor.layer), (0.0, 0.0))
        cells[tensor.kind, tensor.layer] = above + tensor.shift, below + tensor.base
    note = f"{run.name}: {len(alone)} tensors are in one of the two models alone and left out." if alone else ""
    return _panel(run.name, cells, _RELATIVE), note


def _made_as(folder: Path) -> str | None:
    """The fingerprint in the record of the run that made a model folder, where there is one."""
    record: Any
    for home in (folder, *([folder.parent] if folder.name == "model" else [])):
        try:
            record = yaml.safe_load((home / RUN_RECORD).read_text(encoding="utf-8"))
            return str(record["fingerprints"]["model"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
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


def _panel(title: str, cells: Cells, axis: Axis) -> Panel:
    layers = sorted({layer for _, layer in cells})
    places = [-1, *range(max(layers) + 1)] if layers and layers[0] < 0 else list(range(max(layers, default=-1) + 1))
    series = []
    for style, kind in enumerate(KINDS):
        if not any(of_kind == kind for of_kind, _ in cells):
            continue
        points = [(place, _ratio(cells.get((kind, layer)))) for place, layer in enumerate(places)]
        if places[0] < 0 and len(points) > 1:
            points.insert(1, (points[0][0], math.nan))  # no line from outside the layers to the first of them
        x, y = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
        series.append(Series(kind, x, y, style, line=True))
    categories = tuple(OUTSIDE if layer < 0 else str(layer) for layer in places)
    return Panel(title, Axis("layer", scale="category", categories=categories), axis, tuple(series))


def _ratio(cell: tuple[float, float] | None) -> float:
    """NaN where there is nothing, or nothing that a logarithmic axis can show."""
    if cell is None or cell[0] == 0.0 or cell[1] == 0.0:
        return math.nan
    return math.sqrt(cell[0] / cell[1])
