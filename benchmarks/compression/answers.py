"""From inner products, exact ones or a sketch's, to the scores of every method for every number of retain samples.

The way there is the ranking's own (`fillm.rank.gram_sources`, `gram_answers`, `gram_methods`): what is measured is what
a user gets. Subsets of the retain set are its first `n` samples, so both sets are gone through once a sketch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.gram_answers import Answer, answer, without_noise
from fillm.rank.gram_methods import published_scores, scores_of
from fillm.rank.gram_sources import (
    RetainSketches,
    Sketched,
    TensorProducts,
    products_of_gram,
    products_of_sketches,
)
from fillm.rank.scoring import Job
from fillm.statistics import DenseGram, TensorGram

# What is asked of `python -m fillm.rank` for each method; `damage` ranks by equation (8), smallest first.
METHODS: dict[str, dict[str, str]] = {
    "soir": {"method": "soir"},
    "woodbury": {"method": "soir", "curvature": "woodbury"},
    "first-order": {"method": "first-order"},
    "soir-per-sample": {"method": "soir-per-sample"},
    "damage": {"method": "soir", "objective": "retain"},
}
WITHOUT_CROSS_TERMS = ("soir", "woodbury", "soir-per-sample")  # methods that |v|/lambda alone is an answer to
EVERY_SAMPLE = ("first-order", "soir-per-sample")  # methods whose right-hand sides are the forget samples' gradients
Ask = tuple[str, int]  # a method and a number of retain samples
Source = Callable[[bool, int], TensorProducts]  # (of the mean forget gradient?, number of retain samples)


@dataclass(frozen=True)
class Scored:
    """Scores of all tensors with their bounds, [L, m] each: one column, or one a forget sample."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass
class Answers:
    """What was asked of every tensor, in the order of the scope.

    Attributes:
        of: per method and number of retain samples, an answer a tensor.
    """

    of: dict[Ask, list[Answer]] = field(default_factory=dict)

    def scored(self, job: Job, ask: Ask) -> Scored:
        """The scores that the ranking would show."""
        config = _settings(job, ask[0])
        scores = scores_of(dataclasses.replace(job, config=config), without_noise(self.of[ask]))
        if scores.per_sample is None:
            columns = ([[row[name]] for row in scores.rows] for name in ("score", "score_low", "score_high"))
            return Scored(*(np.array(column, dtype=float) for column in columns))
        place = {info.name: row for row, info in enumerate(job.scope)}
        column = {sample.id: number for number, sample in enumerate(job.forget)}
        table = scores.per_sample
        at = (
            np.array([place[name] for name in table["name"].to_pylist()]),
            np.array([column[sample] for sample in table["sample"].to_pylist()]),
        )
        found = []
        for name in ("score", "score_low", "score_high"):
            grid = np.zeros((len(place), len(column)))
            grid[at] = table[name].to_numpy()
            found.append(grid)
        return Scored(*found)


def _settings(job: Job, method: str) -> RankConfig:
    return dataclasses.replace(job.config, **METHODS[method])


def ask_tensor(job: Job, asks: Sequence[Ask], source: Source) -> dict[Ask, Answer]:
    """The answers of one tensor; `damage` has the same as `soir`."""
    found: dict[Ask, Answer] = {}
    for method, n in asks:
        twin = ("soir", n)
        if method == "damage" and twin in found:
            found[method, n] = found[twin]
            continue
        found[method, n] = answer(source(method not in EVERY_SAMPLE, n), _settings(job, method))
    return found


def collect(answers: Answers, of_tensor: Mapping[Ask, Answer]) -> None:
    """Adds a tensor's answers."""
    for ask, one in of_tensor.items():
        answers.of.setdefault(ask, []).append(one)


def exact_source(info: TensorInfo, gram: TensorGram) -> Source:
    """Exact inner products of the first samples."""

    @functools.cache
    def source(mean: bool, n: int) -> TensorProducts:
        return TensorProducts(info, products_of_gram(first_samples(gram, n), mean))

    return source


def first_samples(gram: TensorGram, n: int) -> TensorGram:
    """The Gram matrices with the first `n` retain samples alone."""
    rows = gram.retain_rows is not None and gram.numel <= n
    return dataclasses.replace(
        gram,
        cross=gram.cross[:n],
        retain=gram.retain[:n, :n],
        retain_rows=gram.retain_rows[:n] if rows else None,
        forget_rows=gram.forget_rows if rows else None,
    )


def without_cross_terms(exact: Source) -> Source:
    """The row k = 0: lengths alone, every inner product between different gradients 0."""

    def source(mean: bool, n: int) -> TensorProducts:
        found = exact(mean, n)
        gram = DenseGram(torch.zeros(n, n, dtype=torch.float64))
        nothing = torch.zeros_like(found.products.cross)
        return dataclasses.replace(
            found, products=dataclasses.replace(found.products, cross=nothing, gram=gram, primal=None)
        )

    return source


@dataclass(frozen=True)
class _OneTensor:
    """Sketches of one tensor's gradients, of either set."""

    rows: Tensor
    q: Mapping[str, Tensor]

    def sketches(self, name: str) -> Tensor:
        return self.rows


def sketched_source(info: TensorInfo, sets: Sketched, dtype: torch.dtype) -> Source:
    """A sketch's inner products of the first samples, stored in `dtype`.

    `K` is multiplied out once, of all samples, and the subsets cut out of it; long sketches are made short, for they
    are asked many times. No number changes but in its last bits.
    """
    name, to = info.name, sets.maps[info.name]
    rows, q = sets.retain.sketches(name).to(dtype), sets.retain.q[name]
    targets = sets.forget.sketches(name)
    if to.kind != "exact":
        rows, targets = fewer_numbers(rows, targets)
        if to.kind.startswith("factored"):  # whose halves are asked alone
            to = dataclasses.replace(to, dim=rows.shape[1])
    forget = _OneTensor(targets, sets.forget.q)

    def products(mean: bool, n: int) -> TensorProducts:
        first = _OneTensor(rows[:n], {name: q[:n]})
        some = dataclasses.replace(sets, maps={name: to}, retain=first, forget=forget, v=sets.v if mean else None)
        return next(products_of_sketches(some, [info]))

    whole = products(True, len(q)).products.gram.part(torch.arange(len(q)))

    @functools.cache
    def source(mean: bool, n: int) -> TensorProducts:
        found = products(mean, n)
        return dataclasses.replace(found, products=dataclasses.replace(found.products, gram=DenseGram(whole[:n, :n])))

    return source


def fewer_numbers(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors with the same inner products, in either half of their numbers: at most one number a vector and half.

    Args:
        rows: [n, k].
        targets: [m, k].

    Returns:
        [n, K] and [m, K], float64, with `K = 2 (n + m)`; as they came where `k` is no larger.
    """
    both = torch.cat([rows.double(), targets.double()])
    if both.shape[1] <= 2 * len(both):
        return rows, targets
    middle, parts = both.shape[1] // 2, []
    for half in (both[:, :middle], both[:, middle:]):
        values, vectors = torch.linalg.eigh(half @ half.T)
        parts.append(vectors * values.clamp(min=0.0).sqrt())
    short = torch.cat(parts, 1)
    return short[: len(rows)], short[len(rows) :]


def published(job: Job, sets: Sketched, n: int) -> Scored:
    """Scores the published way, of the first samples: lengths are the sketches' own, the damping divided by `k`."""
    rows = published_scores(job, dataclasses.replace(sets, retain=_First(sets.retain, n))).rows
    value = np.array([[row["score"]] for row in rows], dtype=float)
    return Scored(value, value, value)


@dataclass(frozen=True)
class _First:
    """`RetainSketches` of the first samples."""

    whole: RetainSketches
    n: int

    @property
    def q(self) -> Mapping[str, Tensor]:
        return {name: q[: self.n] for name, q in self.whole.q.items()}

    def sketches(self, name: str) -> Tensor:
        return self.whole.sketches(name)[: self.n]


def asks_for(counts: Sequence[int], size: int | None = None, methods: Sequence[str] = tuple(METHODS)) -> list[Ask]:
    """What there is to ask, of sketches with `size` numbers: the true inverse takes at least as many as samples."""
    return [(method, n) for n in counts for method in methods if method != "woodbury" or size is None or size >= n]


def storages(sizes: Sequence[str] = ("float32", "bfloat16")) -> Iterator[tuple[str, torch.dtype]]:
    """What sketches are stored in."""
    return ((name, getattr(torch, name)) for name in sizes)
