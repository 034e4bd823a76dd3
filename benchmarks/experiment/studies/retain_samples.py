"""How many retain samples a ranking needs: its agreement with that of all of them, and what its mask keeps."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiment import forgetting
from benchmarks.experiment.case import Case
from benchmarks.experiment.figure import dots, lines, panels, save
from benchmarks.experiment.forgetting import Choice
from benchmarks.experiment.rankings import Rankings, counts, spearman, top_overlap
from benchmarks.experiment.results import Record, finite
from fillm.masks import Mask
from fillm.models import catalogue
from fillm.report.figures.damage import WHOLE, against_whole
from fillm.report.figures.intervals import Interval, interval

KEY = ("choice", "loss")
COLUMNS = (*forgetting.COLUMNS, "method", "retain_samples", "spearman", "top_overlap")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "soir": {"method": "soir"},
    "soir-woodbury": {"method": "soir", "curvature": "woodbury"},
    "soir --objective retain": {"method": "soir", "objective": "retain"},
}
DEFAULTS: Mapping[str, Any] = {
    **forgetting.DEFAULTS, "retain_samples": [5, 10, 20, 40], "fraction": 0.1, "side": "top", "methods": list(METHODS)
}  # fmt: skip


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """A record a method, number of retain samples and loss."""
    yield from forgetting.records(case, _choices(case, settings), settings, done)


def _choices(case: Case, settings: Mapping[str, Any]) -> Iterator[Choice]:
    none = {"method": "", "retain_samples": 0, "spearman": 1.0, "top_overlap": 1.0}
    yield {"choice": WHOLE, **none}, partial(Mask.whole, case.model, [info.name for info in catalogue(case.model)])
    rankings, total = Rankings(case), len(case.rows["retain"])
    for method in settings["methods"]:
        whole = rankings.of(METHODS[method]).scores
        for n in counts(total, settings["retain_samples"]):
            ranking = rankings.of(METHODS[method], n if n < total else None)
            about = {
                "choice": f"{method}, {n}", "method": method, "retain_samples": n,
                "spearman": spearman(ranking.scores, whole), "top_overlap": top_overlap(ranking.scores, whole),
            }  # fmt: skip
            yield about, partial(ranking.select, settings["fraction"], settings["side"])


def agreement(records: Sequence[Record], method: str) -> dict[float, Interval]:
    """Number of retain samples -> Spearman with the ranking from all, over models."""
    found: dict[float, dict[Any, float]] = {}
    for row in records:
        if row["method"] == method:
            found.setdefault(row["retain_samples"], {})[row["family"], row["seed"]] = row["spearman"]
    return {n: interval(finite(list(values.values()))) for n, values in sorted(found.items())}


def _methods(records: Sequence[Record]) -> list[str]:
    return [method for method in dict.fromkeys(row["method"] for row in records) if method]


def summary(records: Sequence[Record]) -> str:
    """Agreement, and damage at equal forgetting."""
    lines_ = ["Spearman with the ranking from all retain samples, mean over models (95 % interval)", ""]
    methods = _methods(records)
    of_methods = {method: agreement(records, method) for method in methods}
    lines_ += ["| retain samples | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for n in sorted({n for points in of_methods.values() for n in points}):
        lines_.append(f"| {n} | " + " | ".join(str(of_methods[method].get(n, "")) for method in methods) + " |")
    return "\n".join([*lines_, "", forgetting.table(records, "masks from so many retain samples")])


def draw(records: Sequence[Record], path: Path) -> None:
    """Agreement on the left, damage at the lower level on the right."""
    losses = list(dict.fromkeys(row["loss"] for row in records))
    choices = [name for name in dict.fromkeys(row["choice"] for row in records) if name != WHOLE]
    figure, axes = panels(["the ranking", "what its mask keeps"], 8.0, 1.6 + 0.2 * len(choices))
    points = {method: agreement(records, method) for method in _methods(records)}
    lines(axes[0], points, "retain samples", "Spearman with all retain samples")
    rows = {choice: [(loss, against_whole(records, choice, loss)[0]) for loss in losses] for choice in choices}
    dots(axes[1], rows, "retain damage over that of the whole model (ratio)")
    axes[1].invert_yaxis()
    save(figure, path)
