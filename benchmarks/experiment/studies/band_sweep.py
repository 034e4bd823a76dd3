"""Where in a ranking a mask is best taken: budgets and bands, top against bottom against random, for each method."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiment import forgetting
from benchmarks.experiment.case import Case
from benchmarks.experiment.figure import dots, panels, save
from benchmarks.experiment.forgetting import Choice
from benchmarks.experiment.rankings import Rankings
from benchmarks.experiment.results import Record
from benchmarks.unlearning.study import AT_LEVELS
from fillm.masks import Mask
from fillm.models import catalogue
from fillm.report.figures.damage import WHOLE, against_whole

KEY = ("choice", "loss")
COLUMNS = (*forgetting.COLUMNS, "method", "low", "high")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "soir": {"method": "soir"},
    "soir --objective retain": {"method": "soir", "objective": "retain"},
    "gradient": {"method": "gradient"},
    "random": {"method": "random", "seed": 0},
}
DEFAULTS: Mapping[str, Any] = {
    **forgetting.DEFAULTS, "methods": list(METHODS), "budgets": [0.05, 0.1, 0.3], "bands": 5
}  # fmt: skip


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """A record a part of a ranking and loss."""
    yield from forgetting.records(case, _choices(case, settings), settings, done)


def _choices(case: Case, settings: Mapping[str, Any]) -> Iterator[Choice]:
    none = {"method": "", "low": 0.0, "high": 1.0}
    yield {"choice": WHOLE, **none}, partial(Mask.whole, case.model, [info.name for info in catalogue(case.model)])
    rankings = Rankings(case)
    for method in settings["methods"]:
        part = partial(rankings.mask, METHODS[method])
        for budget in settings["budgets"]:
            about = {"choice": f"{method}: top {budget:g}", "method": method, "low": 0.0, "high": budget}
            yield about, partial(part, budget, "top")
            about = {"choice": f"{method}: bottom {budget:g}", "method": method, "low": 1.0 - budget, "high": 1.0}
            yield about, partial(part, budget, "bottom")
        for index in range(settings["bands"]):
            low, high = index / settings["bands"], (index + 1) / settings["bands"]
            about = {"choice": f"{method}: {low:g} to {high:g}", "method": method, "low": low, "high": high}
            yield about, partial(part, band=(low, high))


def summary(records: Sequence[Record]) -> str:
    """Damage over the whole model's, by part of the ranking."""
    return forgetting.table(records, "parts of rankings")


def draw(records: Sequence[Record], path: Path) -> None:
    """A panel a method, a row a part of its ranking, a dot a loss; nothing before the first method is done."""
    losses = list(dict.fromkeys(row["loss"] for row in records))
    methods = [name for name in dict.fromkeys(row["method"] for row in records) if name]
    if not methods:
        return
    figure, axes = panels(methods, 0.6 + 2.9 * len(methods), 3.6)
    for one, method in zip(axes, methods, strict=True):
        choices = dict.fromkeys(row["choice"] for row in records if row["method"] == method)
        rows = {
            choice.partition(": ")[2]: [
                (loss, against_whole(records, choice, loss, AT_LEVELS[0])[0]) for loss in losses
            ]
            for choice in choices
        }
        dots(one, rows, "retain damage over the whole model's (ratio)")
        one.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        one.invert_yaxis()
    save(figure, path)
