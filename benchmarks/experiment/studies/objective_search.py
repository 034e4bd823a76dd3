"""Which choice of a mask keeps most at equal forgetting, over families, seeds, losses and budgets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.experiment import forgetting
from benchmarks.experiment.case import Case
from benchmarks.experiment.figure import dots, panels, save
from benchmarks.experiment.forgetting import Choice, at_both_levels
from benchmarks.experiment.probe import step_costs
from benchmarks.experiment.rankings import Rankings
from benchmarks.experiment.results import Record
from benchmarks.unlearning.settings import SCOPE
from fillm.masks import Mask
from fillm.models import TensorInfo, catalogue, select_tensors
from fillm.report.figures.damage import WHOLE, merged

KEY = ("choice", "loss")
COLUMNS = (*forgetting.COLUMNS, "ranking", "fraction")
RANKINGS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "soir top": ({"method": "soir"}, "top"),
    "soir bottom": ({"method": "soir"}, "bottom"),
    "least damage": ({"method": "soir", "objective": "retain"}, "top"),
    "trade-off": ({"method": "soir", "objective": "trade-off"}, "top"),
    "woodbury least damage": ({"method": "soir", "curvature": "woodbury", "objective": "retain"}, "top"),
    "gradient top": ({"method": "gradient"}, "top"),
    "gradient bottom": ({"method": "gradient"}, "bottom"),
    "fisher-ratio top": ({"method": "fisher-ratio"}, "top"),
}
STEP = "step"  # benchmarks.experiment.probe
ALL = "all MLP and attention"
DEFAULTS: Mapping[str, Any] = {
    **forgetting.DEFAULTS, "rankings": [*RANKINGS, STEP], "fractions": [0.1, 0.3], "draws": 3, "rise": 1.0
}  # fmt: skip


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """A record a choice and loss."""
    yield from forgetting.records(case, _choices(case, settings), settings, done)


def _choices(case: Case, settings: Mapping[str, Any]) -> Iterator[Choice]:
    every, scope = catalogue(case.model), select_tensors(catalogue(case.model), SCOPE)
    none = {"ranking": "", "fraction": 1.0}
    yield {"choice": WHOLE, **none}, partial(Mask.whole, case.model, [info.name for info in every])
    yield {"choice": ALL, **none}, partial(Mask.whole, case.model, [info.name for info in scope])
    rankings = Rankings(case)
    costs = cache(partial(step_costs, case, [info.name for info in scope], settings["rise"]))
    for fraction in settings["fractions"]:
        for draw in range(settings["draws"]):
            made = partial(rankings.mask, {"method": "random", "seed": draw}, fraction)
            yield {"choice": f"random {draw}, {fraction:g}", "ranking": "random", "fraction": fraction}, made
        for name in settings["rankings"]:
            if name == STEP:
                made = partial(_cheapest_mask, case, costs, scope, fraction)
            else:
                given, side = RANKINGS[name]
                made = partial(rankings.mask, given, fraction, side)
            yield {"choice": f"{name}, {fraction:g}", "ranking": name, "fraction": fraction}, made


def _cheapest_mask(
    case: Case, costs: Callable[[], Mapping[str, float]], scope: Sequence[TensorInfo], fraction: float
) -> Mask:
    return Mask.whole(case.model, cheapest(costs(), scope, fraction))


def cheapest(costs: Mapping[str, float], scope: Sequence[TensorInfo], fraction: float) -> list[str]:
    """The tensors of least cost that fit a fraction of the parameters, in order until one does not; one at least."""
    sizes = {info.name: info.numel for info in scope}
    left, chosen = fraction * sum(sizes.values()), list[str]()
    for name in sorted(costs, key=lambda name: (costs[name], name)):
        if sizes[name] > left and chosen:
            break
        chosen.append(name)
        left -= sizes[name]
    return chosen


def summary(records: Sequence[Record]) -> str:
    """Damage over the whole model's, by choice, loss and level."""
    return forgetting.table(records, "masks")


def draw(records: Sequence[Record], path: Path) -> None:
    """A row a choice, a panel a loss."""
    losses = list(dict.fromkeys(row["loss"] for row in records))
    choices = [name for name in dict.fromkeys(merged(row["choice"]) for row in records) if name != WHOLE]
    figure, axes = panels(losses, 1.8 + 3.2 * len(losses), 1.0 + 0.24 * len(choices), share_y=True)
    for one, loss in zip(axes, losses, strict=True):
        shown = {choice: at_both_levels(records, choice, loss) for choice in choices}
        dots(one, shown, "retain damage over that of the whole model (ratio)")
        one.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        one.axvline(1 / 3, color="black", linewidth=0.8, linestyle=":")
    axes[0].invert_yaxis()
    save(figure, path)
