"""The rows of a benchmark's evaluation: which sets there are, where they come from, and how many of each are taken."""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fillm.data import Row, load_rows
from fillm.data.files import SKIPPABLE
from fillm.errors import DataError, UsageError
from fillm.evaluate.config import EvaluateConfig

PUBLISHED_ROWS = 300  # of the forget and of the retain set: what the logs of Maini et al. 2024 hold

FORGET, RETAIN, HOLDOUT = "forget", "retain", "holdout"
REAL_AUTHORS, WORLD_FACTS, GENERAL = "real_authors", "world_facts", "general"


@dataclass(frozen=True)
class RowSet:
    """One set of rows, not read yet.

    Attributes:
        name: `forget`, `retain`, `real_authors`, `world_facts`, `general`, `holdout`, ...
        spec: where its rows come from, a data spec.
        limit: most rows that are taken; None for all.
        flag: the option that says so, for messages; empty if there is none.
        options: whether the perturbed answers are the wrong options of a question with a short true answer. Then the
            probability is normalised over them, and the answer is its own paraphrase.
        required: whether exactly `limit` rows have to be there.
    """

    name: str
    spec: str
    limit: int | None = None
    flag: str = ""
    options: bool = False
    required: bool = False


def row_sets(config: EvaluateConfig) -> dict[str, RowSet]:
    """The row sets of the benchmark, by name; which of them are read depends on the metrics.

    Args:
        config: `resolved`.

    Raises:
        UsageError: if the benchmark has no such forget split.
    """
    return _SETS[config.benchmark](config)


def utility_sets(sets: Mapping[str, RowSet]) -> list[RowSet]:
    """The sets whose probability, ROUGE-L recall and truth ratio make up the model utility."""
    return [sets[name] for name in (RETAIN, REAL_AUTHORS, WORLD_FACTS, GENERAL) if name in sets]


def read_rows(row_set: RowSet, config: EvaluateConfig) -> list[Row]:
    """The rows of a set: the first `limit`, or `limit` drawn with `--seed`.

    Raises:
        DataError: they cannot be read.
        UsageError: fewer rows than were asked for.
    """
    with every_row_counts():
        rows = load_rows(row_set.spec, data_root=config.data_root)
    if row_set.limit is None:
        return rows
    if row_set.required and row_set.limit > len(rows):
        raise UsageError(f"{row_set.flag} {row_set.limit}: {row_set.spec} has {len(rows)} rows")
    if config.seed is None or row_set.limit >= len(rows):
        return rows[: row_set.limit]
    draw = random.Random(config.seed)
    keys = [draw.random() for _ in rows]
    return [rows[i] for i in sorted(sorted(range(len(rows)), key=keys.__getitem__)[: row_set.limit])]


@contextmanager
def every_row_counts() -> Iterator[None]:
    """Tells nobody to leave rows out: figures over other rows are not those of the benchmark."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(SKIPPABLE, "mend the row")) from None


def _tofu(config: EvaluateConfig) -> dict[str, RowSet]:
    percent = _percent(config, ("01", "05", "10"))
    return _named(
        _forget(config, f"tofu:forget{percent}_perturbed"),
        _retain(config, "tofu:retain_perturbed"),
        RowSet(REAL_AUTHORS, "tofu:real_authors_perturbed", options=True),
        RowSet(WORLD_FACTS, "tofu:world_facts_perturbed", options=True),
        RowSet(HOLDOUT, config.holdout or f"tofu:holdout{percent}"),
    )


def _fictional(config: EvaluateConfig) -> dict[str, RowSet]:
    kind = config.benchmark
    percent = _percent(config, ("05", "10") if kind == "fictional-small" else ("01", "05", "10"))
    return _named(
        _forget(config, f"{kind}:forget{percent}"),
        _retain(config, f"{kind}:retain{100 - int(percent)}"),
        RowSet(GENERAL, f"{kind}:general", options=True),
        RowSet(HOLDOUT, config.holdout or f"{kind}:holdout{percent}"),
    )


def _knowundo(config: EvaluateConfig) -> dict[str, RowSet]:
    """`--forget privacy` stands for the validation rows, which the published evaluation reads."""
    domain, *rest = str(config.forget).split("/")
    part = {(): "val", ("unlearn_val",): "val", ("unlearn_train",): "train"}.get(tuple(rest))
    if domain not in ("privacy", "copyright") or part is None:
        raise UsageError(
            f"--forget {config.forget}: of knowundo give privacy or copyright (their validation rows), or "
            "privacy/unlearn_train"
        )
    some = {FORGET: ("unlearn", config.num_forget), RETAIN: ("retention", config.num_retain)}
    sets = [
        RowSet(name, f"knowundo:{domain}/{scope}_{part}", limit, f"--num-{name}", required=True)
        for name, (scope, limit) in some.items()
    ]
    return _named(*sets, *([RowSet(HOLDOUT, config.holdout)] if config.holdout else []))


def _percent(config: EvaluateConfig, percents: tuple[str, ...]) -> str:
    """`01` of `forget01`."""
    found = re.fullmatch(r"forget(\d\d)", str(config.forget))
    if found is None or found[1] not in percents:
        there = ", ".join(f"forget{one}" for one in percents)
        raise UsageError(
            f"--forget {config.forget}: no forget split of {config.benchmark}; there are {there} (rows of your own go "
            "into a folder given as --data-root)"
        )
    return found[1]


def _forget(config: EvaluateConfig, spec: str) -> RowSet:
    return RowSet(FORGET, spec, config.num_forget or PUBLISHED_ROWS, "--num-forget", required=bool(config.num_forget))


def _retain(config: EvaluateConfig, spec: str) -> RowSet:
    return RowSet(RETAIN, spec, config.num_retain or PUBLISHED_ROWS, "--num-retain", required=bool(config.num_retain))


def _named(*sets: RowSet) -> dict[str, RowSet]:
    return {one.name: one for one in sets}


_SETS: dict[str, Callable[[EvaluateConfig], dict[str, RowSet]]] = {
    "tofu": _tofu,
    "fictional": _fictional,
    "fictional-small": _fictional,
    "knowundo": _knowundo,
}
