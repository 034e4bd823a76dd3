"""Means, step dots, groups and the search for what is not finite, against direct formulas; states that resume."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fillm.capture.gradients import DenseGradients, OuterGradients
from fillm.statistics import (
    Groups,
    MeanGradient,
    RetainMoments,
    SquaredNorms,
    StepDots,
    WeightedSum,
    inner,
    squared_norm,
)
from fillm.statistics.accumulators import first_not_finite
from tests.statistics.synthetic import COUNT, SHAPES, batches, mixed_scales


def test_mean_gradient() -> None:
    v, g = mixed_scales()
    statistic = MeanGradient(v, COUNT)
    for name, gradients, where in batches(g):
        statistic.observe(name, gradients, where)
    for name in SHAPES:
        assert statistic.mean[name].dtype == torch.float32
        assert torch.allclose(statistic.mean[name].double(), g[name].double().mean(0), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_accumulators_are_no_narrower_than_float32(dtype: torch.dtype) -> None:
    statistic = MeanGradient({"a": torch.zeros(3, dtype=dtype)}, 1)
    assert statistic.mean["a"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_norms_and_inner_products_in_blocks() -> None:
    a = torch.randn(3, 700_001, generator=torch.Generator().manual_seed(0))
    b = torch.randn(3, 700_001, generator=torch.Generator().manual_seed(1))
    assert squared_norm(a) == pytest.approx(float((a.double() ** 2).sum()), rel=1e-12)
    assert inner(a, b) == pytest.approx(float((a.double() * b.double()).sum()), rel=1e-9)
    assert squared_norm(a.T) == pytest.approx(squared_norm(a), rel=1e-12)
    assert math.isinf(squared_norm(torch.tensor([1.0, math.inf])))
    assert math.isnan(squared_norm(torch.tensor([1.0, math.nan])))


def outer(seed: int = 0) -> tuple[OuterGradients, Tensor]:
    """Three samples of a [6, 4] weight and their dense gradients."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(9, 4, generator=generator), torch.randn(9, 6, generator=generator)
    offsets = torch.tensor([0, 4, 5, 9])
    dense = torch.stack([dy[a:b].double().T @ x[a:b].double() for a, b in ((0, 4), (4, 5), (5, 9))])
    return OuterGradients(x, dy, offsets), dense


@pytest.mark.parametrize(
    ("groups", "flatten"),
    [
        (None, lambda s: s.sum((1, 2))[:, None]),
        (Groups(0, torch.arange(6), 6), lambda s: s.sum(2)),
        (Groups(0, torch.tensor([0, 0, 1, 1, 2, 2]), 3), lambda s: s.sum(2).view(3, 3, 2).sum(2)),
        (Groups(1, torch.tensor([1, 0, 1, 0]), 2), lambda s: torch.stack([s[..., 1::2], s[..., 0::2]], 1).sum((2, 3))),
    ],
    ids=["tensor", "rows", "heads", "columns"],
)
def test_step_dots_are_summed_before_they_are_squared(
    groups: Groups | None, flatten: Callable[[Tensor], Tensor]
) -> None:
    gradients, dense = outer()
    u = torch.randn(6, 4, generator=torch.Generator().manual_seed(7))
    statistic = StepDots({"w": u}, 5, {} if groups is None else {"w": groups})
    statistic.observe("w", gradients, torch.tensor([0, 1, 2]))
    s = flatten(dense * u.double())  # [samples, groups]
    mean, mean_square = statistic.moments("w")
    assert torch.allclose(mean.reshape(-1), s.sum(0) / 5, rtol=1e-5)
    assert torch.allclose(mean_square.reshape(-1), s.square().sum(0) / 5, rtol=1e-5)


def test_step_dots_of_every_weight() -> None:
    gradients, dense = outer()
    u = torch.randn(6, 4, generator=torch.Generator().manual_seed(7))
    statistic = StepDots({"w": u}, 3, element=True)
    statistic.observe("w", gradients, torch.tensor([2, 0, 1]))
    s = dense * u.double()
    mean, mean_square = statistic.moments("w")
    # Float32 sums over a sample's tokens and over three samples; the mean may cancel, the squares do not.
    assert torch.allclose(mean, s.mean(0), rtol=1e-6, atol=1e-6 * float(s.abs().max()))
    assert torch.allclose(mean_square, s.square().mean(0), rtol=2e-6, atol=1e-12)


def test_groups_of_vectors_matrices_and_stacks() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert Groups(0, torch.tensor([1, 0, 1]), 2).sum_entries(matrix).tolist() == [22.0, 44.0]
    assert Groups(1, torch.tensor([0, 0, 1, 2]), 3).sum_entries(matrix).tolist() == [27.0, 18.0, 21.0]
    assert Groups(0, torch.tensor([0, 1, 0, 1]), 2).sum_entries(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [
        4.0,
        6.0,
    ]
    stack = torch.arange(8.0).view(2, 2, 2)
    assert Groups(0, torch.arange(4), 4).sum_entries(stack).tolist() == [1.0, 5.0, 9.0, 13.0]


def test_first_not_finite_among_the_batch() -> None:
    q = {"a": torch.tensor([1.0, math.inf, 1.0, 1.0]), "b": torch.tensor([1.0, 1.0, 1.0, math.nan])}
    d = {"a": torch.tensor([1.0, 1.0, -math.inf, 1.0]), "b": torch.ones(4)}
    assert first_not_finite([0], q, d) is None
    assert first_not_finite([3, 0], q) == ("b", 3)
    assert first_not_finite([3, 1], q) == ("a", 1)
    assert first_not_finite([0, 2], q, d) == ("a", 2)
    norms = SquaredNorms({"a": torch.zeros(2)}, 3)
    norms.observe("a", DenseGradients(torch.tensor([[1.0, 2.0], [math.inf, 0.0]])), torch.tensor([2, 0]))
    assert norms.q["a"].tolist() == [math.inf, 0.0, 5.0]
    assert norms.first_not_finite([1, 2]) is None and norms.first_not_finite([2, 0]) == ("a", 0)


def statistics() -> dict[str, Callable[[], Any]]:
    v, _ = mixed_scales()
    weights = {name: torch.linspace(-1, 1, COUNT, dtype=torch.float64) for name in v}
    rows = {"matrix": Groups(0, torch.arange(160) // 8, 20)}
    return {
        "mean": lambda: MeanGradient(v, COUNT),
        "norms": lambda: SquaredNorms(v, COUNT),
        "moments": lambda: RetainMoments(v, COUNT, 0.1, weighted=v),
        "moments, selective": lambda: RetainMoments(v, COUNT, 0.1, weighted=v, tolerance=1.0),
        "weighted": lambda: WeightedSum(v, weights, COUNT),
        "dots": lambda: StepDots(v, COUNT),
        "dots of groups": lambda: StepDots(v, COUNT, rows),
        "dots of weights": lambda: StepDots(v, COUNT, element=True),
    }


@pytest.mark.parametrize("kind", list(statistics()))
@pytest.mark.parametrize("stop", [1, 4, 8])
def test_interrupted_pass_ends_with_the_same_bits(kind: str, stop: int) -> None:
    make, (_, g) = statistics()[kind], mixed_scales()
    steps = [list(batches(g))[i : i + len(g)] for i in range(0, len(list(batches(g))), len(g))]

    def feed(statistic: Any, part: list[Any]) -> None:
        for step in part:
            for name, gradients, where in step:
                statistic.observe(name, gradients, where)
            if hasattr(statistic, "after_batch"):
                statistic.after_batch()

    whole, first, second = make(), make(), make()
    feed(whole, steps)
    feed(first, steps[:stop])
    saved = {key: tensor.clone() for key, tensor in first.state().items()}
    second.load(saved)
    feed(second, steps[stop:])
    end, resumed = whole.state(), second.state()
    assert end.keys() == resumed.keys()
    assert all(end[key].dtype == resumed[key].dtype and torch.equal(end[key], resumed[key]) for key in end)
    if kind.startswith("moments"):
        for name in whole.sums:
            for one, other in zip(whole.weighted_sum(name), second.weighted_sum(name), strict=True):
                assert torch.equal(one, other)
