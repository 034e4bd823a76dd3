"""The ways to choose a mask that are compared, and the masks of one model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.part import part_of
from benchmarks.unlearning.settings import SCOPE, UnlearningConfig
from fillm.data import Row
from fillm.errors import UsageError
from fillm.masks import Mask
from fillm.models import catalogue, load_model, select_tensors
from fillm.rank import rank_parameters
from fillm.rank.ranking import Ranking


@dataclass(frozen=True)
class Choice:
    """One way to choose a mask.

    Attributes:
        name: in tables.
        settings: of `rank_parameters`; None where nothing is ranked.
        side: `top` or `bottom` of the ranking; with no ranking, `scope` (MLP and attention) or `whole` (all tensors).
    """

    name: str
    settings: dict[str, Any] | None
    side: str = "top"


METHODS: dict[str, dict[str, Any]] = {
    "soir": {"method": "soir"},
    "soir-woodbury": {"method": "soir", "curvature": "woodbury"},
    "soir-diagonal": {"method": "soir", "curvature": "diagonal"},
    "soir-sum": {"method": "soir-sum"},
    "first-order": {"method": "first-order"},
    "gradient": {"method": "gradient"},
    "memflex": {"method": "memflex", "similarity": 0.22, "magnitude": 4.79e-5},
    "fisher-ratio": {"method": "fisher-ratio"},
    "wagle": {"method": "wagle"},
    "saliency": {"method": "saliency"},
    "parameter-shift": {"method": "parameter-shift"},
    "path weights": {"method": "path", "granularity": "element"},  # single weights, not whole tensors
}
OBJECTIVES = ("retain", "trade-off")


def choices(config: UnlearningConfig) -> list[Choice]:
    """All choices, or those that the settings name.

    Raises:
        UsageError: if `--choices` names others.
    """
    found = [Choice("whole model", None, "whole"), Choice("all MLP and attention", None, "scope")]
    found += [Choice(f"random {draw}", {"method": "random", "seed": draw}) for draw in range(config.draws)]
    for name, settings in METHODS.items():
        found += [Choice(f"{name} {side}", settings, side) for side in ("top", "bottom")]
    found += [Choice(f"soir --objective {one}", {"method": "soir", "objective": one}) for one in OBJECTIVES]
    if config.quick:
        found = [one for one in found if one.name in ("all MLP and attention", "random 0", "soir bottom")]
    if config.choices is not None:
        wanted = [word.strip() for word in config.choices.split(",")]
        unknown = [name for name in wanted if name not in {one.name for one in found}]
        if unknown:
            raise UsageError(
                f"--choices: there is no {', '.join(unknown)}; there are {', '.join(c.name for c in found)}"
            )
        found = [one for one in found if one.name in wanted]
    return part_of(found, config.part)


def masks(
    config: UnlearningConfig,
    model: nn.Module,
    tokenizer: Any,
    rows: dict[str, list[Row]],
    base: Callable[[], Path],
    wanted: list[Choice],
) -> Iterator[tuple[Choice, Mask]]:
    """The masks of some choices in one model; a ranking is made once for both of its sides.

    Args:
        config: the settings.
        model: that recites its rows.
        tokenizer: its tokenizer.
        rows: `forget` and `retain`.
        base: makes the folder of the model before its first step, for `parameter-shift`.
        wanted: the choices.
    """
    scope = [info.name for info in select_tensors(catalogue(model), SCOPE)]
    rankings: dict[str, Ranking] = {}
    for choice in wanted:
        if choice.settings is None:
            names = scope if choice.side == "scope" else [info.name for info in catalogue(model)]
            yield choice, Mask.whole(model, names)
            continue
        key = repr(sorted(choice.settings.items()))
        if key not in rankings:
            settings = dict(choice.settings)
            if settings["method"] == "parameter-shift":
                settings["base_model"] = load_model(str(base()), device="cpu")
            forget, retain = ([row.fields for row in rows[name]] for name in ("forget", "retain"))
            rankings[key] = rank_parameters(model, tokenizer, forget, retain, include=SCOPE, **settings)
        yield choice, rankings[key].select(config.fraction, choice.side)


def level_crossing(forget: np.ndarray, retain: np.ndarray, level: float) -> float:
    """The retain loss where the forget loss first reaches a level, on straight lines between evaluations.

    Args:
        forget: its losses after 0, 1, 2, ... steps, [S].
        retain: the losses of the retain set, [S].
        level: of the forget loss.

    Returns:
        Nats a token; NaN if the level is never reached.
    """
    reached = np.flatnonzero(forget >= level)
    if not reached.size:
        return float("nan")
    at = int(reached[0])
    if at == 0:
        return float(retain[0])
    part = (level - forget[at - 1]) / (forget[at] - forget[at - 1])
    return float(retain[at - 1] + part * (retain[at] - retain[at - 1]))
