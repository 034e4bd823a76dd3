"""Studies of tensors, layers and curvatures: means over models, with their intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fillm.report.figures.damage import Row, by_model, model_of
from fillm.report.figures.data import Axis, FigureData, Panel, Series
from fillm.report.figures.frontier_of_study import over_models
from fillm.report.figures.study_names import STUDENT, claim_of, stems
from fillm.report.result_files import rows_of
from fillm.report.runs import Run

_ENDS = ("forget", "retain")


def study_means(runs: Sequence[Run]) -> list[FigureData]:
    """A figure for every such study."""
    found = [(run, rows, draw) for kind, draw in _KINDS.items() for run, rows in rows_of(runs, kind)]
    names = stems([run for run, *_ in found])
    return [draw(run, rows, stem) for (run, rows, draw), stem in zip(found, names, strict=True)]


def _shifts(run: Run, rows: Sequence[Row], stem: str) -> FigureData:
    """How far matrices moved: a line a kind over layers."""
    layers = sorted({row["layer"] for row in rows})
    series = []
    for style, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        own = {layer: [r for r in rows if (r["kind"], r["layer"]) == (kind, layer)] for layer in layers}
        some = [layer for layer in layers if own[layer]]
        places = [layers.index(layer) for layer in some]
        series.append(_line(kind, style, places, [_values(own[layer], "relative_shift") for layer in some]))
    names = tuple("outside" if layer < 0 else str(layer) for layer in layers)
    panel = Panel(
        "relative shift",
        Axis("layer", scale="category", categories=names),
        Axis("length of the change over length before", "ratio"),
        tuple(series),
    )
    words = "A matrix's change by fine-tuning; of matrices of one kind in one layer the mean."
    return _figure(run, f"{stem}_shift", words, [panel])


def _layers(run: Run, rows: Sequence[Row], stem: str) -> FigureData:
    """What unlearning one layer at a time does to both losses: a panel a loss and number of steps."""
    layers = tuple(dict.fromkeys(row["layer"] for row in rows))
    panels = []
    for loss, steps in dict.fromkeys((row["loss"], row["steps"]) for row in rows):
        own = [row for row in rows if (row["loss"], row["steps"]) == (loss, steps)]
        series = []
        for style, end in enumerate(_ENDS):
            of_layers = {layer: [row for row in own if row["layer"] == layer] for layer in layers}
            some = [layer for layer in layers if of_layers[layer]]
            rises = [_values(of_layers[layer], f"{end}_end", f"{end}_start") for layer in some]
            series.append(_line(f"{end} loss", style, [layers.index(layer) for layer in some], rises))
        x = Axis("what was unlearned in", scale="category", categories=layers)
        panels.append(Panel(f"{loss}, {steps:g} steps", x, Axis("rise of the loss", "nats a token"), tuple(series)))
    words = "The rise of both losses after so many steps in one layer by itself."
    return _figure(run, f"{stem}_layers", words, panels)


def _curvatures(run: Run, rows: Sequence[Row], stem: str) -> FigureData:
    """How alike two curvatures rank: a panel a scope, a line a pair over numbers of retain samples."""
    panels = []
    pairs = list(dict.fromkeys((row["one"], row["other"]) for row in rows))
    for scope in dict.fromkeys(row["scope"] for row in rows):
        series = []
        for style, pair in enumerate(pairs):
            own = [row for row in rows if (row["scope"], row["one"], row["other"]) == (scope, *pair)]
            counts = sorted({row["retain_samples"] for row in own})
            alike = [_values([row for row in own if row["retain_samples"] == n], "spearman") for n in counts]
            if counts:
                series.append(_line(" against ".join(pair), style, counts, alike))
        axes = Axis("retain samples", scale="log"), Axis("Spearman's rank correlation of the scores")
        panels.append(Panel(scope, *axes, tuple(series)))
    return _figure(run, f"{stem}_curvatures", "Scores of the same tensors by two curvatures.", panels)


_KINDS: dict[str, Callable[[Run, Sequence[Row], str], FigureData]] = {
    "shifts": _shifts, "layers": _layers, "curvatures": _curvatures
}  # fmt: skip


def _values(rows: Sequence[Row], column: str, less: str | None = None) -> dict[Any, list[float]]:
    """Model -> the values of a column in its rows, less those of another."""
    return by_model(
        (model_of(row), np.nan if row[column] is None else row[column] - (row[less] if less else 0.0)) for row in rows
    )


def _line(name: str, style: int, places: Sequence[float], drawn: Sequence[dict[Any, list[float]]]) -> Series:
    found = [over_models(values, geometric=False) for values in drawn]
    mean, low, high = (np.array([getattr(one, end) for one in found]) for end in ("mean", "low", "high"))
    labels = tuple(f"{one.count} models" for one in found)
    return Series(name, np.array(places, np.float64), mean, style, y_low=low, y_high=high, line=True, labels=labels)


def _figure(run: Run, name: str, words: str, panels: Sequence[Panel]) -> FigureData:
    title = run.study.get("title", run.name)
    caption = " ".join(filter(None, (words, STUDENT, claim_of(run))))
    return FigureData(name, title, caption, tuple(panels), columns=min(3, len(panels)))
