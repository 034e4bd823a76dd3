"""Single weights chosen by what they contribute along the optimiser's first step, against masks of whole tensors.

The rows to keep are dealt into two halves: masks are made from the first; what is lost is read on the second, which
took part in nothing. The losses have no retain term, so that what is kept is the mask's doing alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiment import forgetting
from benchmarks.experiment.case import Case
from benchmarks.experiment.forgetting import ALONE, Choice
from benchmarks.experiment.rankings import Rankings
from benchmarks.experiment.results import Record
from benchmarks.experiment.studies import objective_search
from benchmarks.experiment.studies.objective_search import RANKINGS
from benchmarks.unlearning.settings import SCOPE
from fillm.masks import Mask
from fillm.models import catalogue, select_tensors
from fillm.report.figures.damage import WHOLE

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


def _choices(case: Case, settings: Mapping[str, Any]) -> Iterator[Choice]:
    every, scope = catalogue(case.model), [info.name for info in select_tensors(catalogue(case.model), SCOPE)]
    yield (
        {"choice": WHOLE, "ranking": "", "fraction": 1.0},
        partial(Mask.whole, case.model, [info.name for info in every]),
    )
    rankings, fraction = Rankings(case), settings["fraction"]
    along = {"path_rise": QUICK_RISE if case.quick else settings["rise"], "path_points": settings["points"]}
    for path in settings["paths"]:
        for part in settings["path_fractions"]:
            about = {"choice": f"path {path}, {part:g}", "ranking": f"path {path}", "fraction": part}
            yield about, partial(path_mask, rankings, path, part, along)
    sizes = {info.name: info.shape for info in every if info.name in scope}
    for seed in range(settings["draws"]):
        made = partial(rankings.mask, {"method": "random", "seed": seed}, fraction)
        yield {"choice": f"random {seed}, {fraction:g}", "ranking": "random", "fraction": fraction}, made
    generator = torch.Generator().manual_seed(case.seed)
    drawn = {name: torch.rand(tuple(shape), generator=generator) for name, shape in sizes.items()}
    about = {"choice": f"weights at random, {fraction:g}", "ranking": "random weights", "fraction": fraction}
    yield about, partial(Mask.from_bool, best_weights(drawn, fraction))
    for name in settings["rankings"]:
        given, side = RANKINGS[name]
        about = {"choice": f"{name}, {fraction:g}", "ranking": name, "fraction": fraction}
        yield about, partial(rankings.mask, given, fraction, side)


def path_mask(rankings: Rankings, path: str, fraction: float, along: Mapping[str, Any]) -> Mask:
    """The best weights by the path ranking.

    Args:
        rankings: of the model.
        path: what is taken, `weights`, `rows`, or weights in so many `rounds N`, and how many times the damage counts
            (`weights, 3`).
        fraction: of the MLP and attention weights.
        along: how the step is followed, settings of `fillm.rank`.
    """
    what, _, times = path.partition(", ")
    given = {"method": "path", "granularity": "element", "path_weight": float(times), **along}
    if what.startswith("rounds "):
        given |= {"path_rounds": int(what.removeprefix("rounds ")), "path_keep": fraction}
    ranking = rankings.of(given)
    if what != "rows":
        return ranking.select(fraction)
    scores = {name: ranking.updates[f"scores/{name}"] for name in ranking.names}
    return Mask.from_bool(best_weights(by_row(scores), fraction))


def best_weights(scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """The so-many weights of the highest scores, ties by tensor and then by place, as bool tensors."""
    flat = torch.cat([scores[name].flatten() for name in scores])
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: max(1, int(fraction * flat.numel()))]] = True
    parts = chosen.split([scores[name].numel() for name in scores])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


def by_row(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight given the mean score of its row of the matrix as it is stored; what is not moved counts as 0."""
    zeroed = {name: score.nan_to_num(neginf=0.0) for name, score in scores.items()}
    return {name: score.mean(-1, keepdim=True).expand_as(score).contiguous() for name, score in zeroed.items()}
