"""Rankings of one model, made once each, and what two of them have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.experiment.case import Case
from benchmarks.unlearning.settings import SCOPE
from fillm.masks import Mask
from fillm.models import load_model
from fillm.rank import rank_parameters
from fillm.rank.ranking import Ranking


class Rankings:
    """Of one model, over its MLP and attention tensors.

    Args:
        case: the model.
    """

    def __init__(self, case: Case) -> None:
        self._case, self._made = case, dict[str, Ranking]()

    def of(self, settings: Mapping[str, Any], retain: int | None = None, include: str = SCOPE) -> Ranking:
        """By some settings of `rank_parameters`, from the first so many retain rows (None: all)."""
        key = repr((sorted(settings.items()), retain, include))
        if key not in self._made:
            given, case = dict(settings), self._case
            if given["method"] == "parameter-shift":
                given["base_model"] = load_model(str(case.base()), device="cpu")
            forget, kept = ([row.fields for row in case.rows[name]] for name in ("forget", "retain"))
            self._made[key] = rank_parameters(
                case.model, case.tokenizer, forget, kept[:retain], include=include, **given
            )
        return self._made[key]

    def mask(self, settings: Mapping[str, Any], *choice: Any, **options: Any) -> Mask:
        """What a choice, as of `fillm.Ranking.select`, takes of the ranking by some settings."""
        return self.of(settings).select(*choice, **options)


def spearman(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Of the scores of what both rank."""
    names = [name for name in one if name in other]
    return float(spearmanr([one[name] for name in names], [other[name] for name in names]).statistic)


def top_overlap(one: Mapping[str, float], other: Mapping[str, float], part: float = 0.1) -> float:
    """The share of the best tenth of one that is in the best tenth of the other."""
    count = max(1, round(part * len(one)))
    best = [set(sorted(scores, key=lambda name: -scores[name])[:count]) for scores in (one, other)]
    return len(best[0] & best[1]) / count


def counts(total: int, wanted: Sequence[int]) -> list[int]:
    """Numbers of retain rows that there are, all of them last."""
    return [*(n for n in np.unique(wanted).tolist() if n < total), total]
