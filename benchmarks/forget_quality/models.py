"""The pairs of models that are compared: one that recites all rows, one that never saw those to forget."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.end_to_end.workload import FICTIONAL, RECIPE, TOFU, trained_folder
from benchmarks.forget_quality.settings import ForgetQualityConfig
from fillm.data import Row, load_rows
from fillm.errors import DataError
from fillm.models import load_model, load_tokenizer

# The rows of `TOFU` with paraphrased and wrong answers, which the models are not trained on.
_SCORED_TOFU = ("tofu:forget10_perturbed[360:]", "tofu:forget10_perturbed[:360]")
_SETS = ("forget", "retain")


@dataclass(frozen=True)
class Pair:
    """The two models of one seed.

    Attributes:
        seed: of their first weights, which they share, and of the order of their rows.
        full: recites the rows of both sets; it is what unlearns.
        retain_only: folder of the model that was trained the same way on the retain rows alone.
        tokenizer: of both.
        rows: `forget` and `retain`, as trained on.
        scored: the same with their paraphrased and wrong answers; of `retain` those that are scored.
    """

    seed: int
    full: nn.Module
    retain_only: Path
    tokenizer: Any
    rows: dict[str, list[Row]]
    scored: dict[str, list[Row]]


def pair(config: ForgetQualityConfig, tofu: bool, seed: int, say: Callable[[str], None]) -> Pair:
    """Trains the models of one seed, or takes them from the cache.

    Raises:
        DataError: rows that cannot be read, or whose scored form asks or answers something else.
    """
    rows = _read(TOFU if tofu else FICTIONAL, config)
    scored = _read(_SCORED_TOFU, config) if tofu else rows
    recipe: dict[str, Any] = {**RECIPE, "seed": seed}
    if config.quick:
        rows, scored = ({name: some[:20] for name, some in every.items()} for every in (rows, scored))
        recipe |= {"architecture": "tiny", "vocab_size": 300, "epochs": 1, "target_loss": None}
    _check_same(rows, scored)
    full = trained_folder([*rows["retain"], *rows["forget"]], recipe, say)
    shared = {**recipe, "tokenizer": str(full)}
    shared.pop("vocab_size", None)
    # The tokenizer is a path of this machine; what it is made of stands for it.
    retain_only = trained_folder(rows["retain"], shared, say, {**recipe, "tokenizer": full.name})
    chosen = {"forget": scored["forget"], "retain": evenly(scored["retain"], config.score_retain)}
    return Pair(seed, load_model(str(full), device="cpu"), retain_only, load_tokenizer(str(full)), rows, chosen)


def evenly(rows: list[Row], count: int) -> list[Row]:
    """`count` of the rows at even steps, so that all authors are among them; all, if there are no more."""
    return rows if count >= len(rows) else [rows[place * len(rows) // count] for place in range(count)]


def _read(specs: tuple[str, str], config: ForgetQualityConfig) -> dict[str, list[Row]]:
    return {name: load_rows(spec, data_root=config.data_root) for name, spec in zip(_SETS, specs, strict=True)}


def _check_same(rows: dict[str, list[Row]], scored: dict[str, list[Row]]) -> None:
    for name in _SETS:
        for learned, asked in zip(rows[name], scored[name], strict=True):
            if any(learned.fields[field] != asked.fields[field] for field in ("question", "answer")):
                raise DataError(
                    f"{asked.where}: not the question and answer of {learned.where}; take TOFU as published"
                )
