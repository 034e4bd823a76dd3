"""Single weights chosen by what they contribute along the optimiser's first step, against masks of whole tensors.

The rows to keep are dealt into two halves: masks are made from the first; what is lost is read on the second, which
took part in nothing. The losses have no retain term, so that what is kept is the mask's doing alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.experiment import forgetting
from benchmarks.experiment.case import Case
from benchmarks.experiment.forgetting import ALONE, WHOLE
from benchmarks.experiment.path import Contributions, best_weights, by_row, contributions, worth
from benchmarks.experiment.rankings import Rankings
from benchmarks.experiment.results import Record
from benchmarks.experiment.studies import objective_search
from benchmarks.experiment.studies.objective_search import RANKINGS
from benchmarks.unlearning.settings import SCOPE
from fillm.masks import Mask
from fillm.models import catalogue, select_tensors

QUICK_RISE = 0.01  # nats; a model that knows nothing cannot forget much
KEY = ("choice", "loss")
COLUMNS = objective_search.COLUMNS
DEFAULTS: Mapping[str, Any] = {
    **forgetting.DEFAULTS, "losses": ["ga", "npo" + ALONE], "rankings": ["soir top", "soir bottom", "least damage"],
    "fraction": 0.3, "draws": 1, "rise": 1.0, "points": 4,
    "paths": ["weights, 1", "weights, 3", "weights, 10", "rows, 3"], "path_fractions": [0.1, 0.3],
}  # fmt: skip
summary, draw = objective_search.summary, objective_search.draw


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """A record a choice and loss."""
    kept = case.rows["retain"]
    ranked, held = (dataclasses.replace(case, rows={**case.rows, "retain": half}) for half in (kept[::2], kept[1::2]))
    yield from forgetting.records(held, _choices(ranked, settings), settings, done)


def _choices(case: Case, settings: Mapping[str, Any]) -> Iterator[tuple[Record, Mask]]:
    every, scope = catalogue(case.model), [info.name for info in select_tensors(catalogue(case.model), SCOPE)]
    yield {"choice": WHOLE, "ranking": "", "fraction": 1.0}, Mask.whole(case.model, [info.name for info in every])
    rise = QUICK_RISE if case.quick else settings["rise"]
    found = contributions(case, case.rows["retain"], scope, rise, settings["points"])
    for path in settings["paths"] if found is not None else []:
        for fraction in settings["path_fractions"]:
            mask = Mask.from_bool(best_weights(scores(found, path), fraction))
            yield {"choice": f"path {path}, {fraction:g}", "ranking": f"path {path}", "fraction": fraction}, mask
    rankings, fraction = Rankings(case), settings["fraction"]
    sizes = {info.name: info.shape for info in every if info.name in scope}
    for seed in range(settings["draws"]):
        mask = rankings.of({"method": "random", "seed": seed}).select(fraction)
        yield {"choice": f"random {seed}, {fraction:g}", "ranking": "random", "fraction": fraction}, mask
    generator = torch.Generator().manual_seed(case.seed)
    drawn = {name: torch.rand(tuple(shape), generator=generator) for name, shape in sizes.items()}
    about = {"choice": f"weights at random, {fraction:g}", "ranking": "random weights", "fraction": fraction}
    yield about, Mask.from_bool(best_weights(drawn, fraction))
    for name in settings["rankings"]:
        given, side = RANKINGS[name]
        about = {"choice": f"{name}, {fraction:g}", "ranking": name, "fraction": fraction}
        yield about, rankings.of(given).select(fraction, side)


def scores(found: Contributions, path: str) -> Mapping[str, torch.Tensor]:
    """By name: `gain`, or what is scored and how many times the damage counts (`weights, 3`)."""
    if path == "gain":
        return found.gain
    what, _, times = path.partition(", ")
    worths = worth(found, float(times))
    return by_row(worths) if what == "rows" else worths
