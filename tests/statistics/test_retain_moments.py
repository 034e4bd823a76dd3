"""The retain pass on gradients of very different sizes: scalars, weighted sum, expansion and revisits."""

import pytest
import torch
from torch import Tensor

from fillm.capture.gradients import DenseGradients
from fillm.statistics import EXPANSION_NUMEL, RetainMoments, WeightedSum
from fillm.statistics.retain import EXPANSION_TERMS, REVISIT_TOLERANCE
from tests.statistics.synthetic import COUNT, SHAPES, batches, exact_weighted_sum, mixed_scales

DAMPING = 0.1


def collected(factor: float | None, seed: int = 0) -> tuple[RetainMoments, dict[str, Tensor], dict[str, Tensor]]:
    """Moments after a pass whose estimate of lambda is the first batch's, or off by `factor`."""
    v, g = mixed_scales(seed)
    moments = RetainMoments(v, COUNT, DAMPING, weighted=v)
    if factor is not None:
        for name, values in g.items():
            mean = float(values.double().flatten(1).square().sum(1).mean())
            moments.estimate[name] = factor * DAMPING * mean / v[name].numel()
    for name, gradients, where in batches(g):
        moments.observe(name, gradients, where)
    return moments, v, g


def test_shapes_stand_on_both_sides_of_the_expansion() -> None:
    v, _ = mixed_scales()
    assert v["norm"].numel() <= EXPANSION_NUMEL < v["matrix"].numel()
    moments = RetainMoments(v, COUNT, DAMPING, weighted=v)
    assert {name: len(sums) for name, sums in moments.sums.items()} == {
        "scalars": 1 + EXPANSION_TERMS,
        "norm": 1 + EXPANSION_TERMS,
        "matrix": 1,
    }


def test_scalars_of_every_sample() -> None:
    moments, v, g = collected(None)
    for name in SHAPES:
        wide = g[name].double().flatten(1)
        scalars = moments.scalars(name)
        assert torch.allclose(scalars.q, wide.square().sum(1), rtol=1e-12)
        assert torch.allclose(scalars.d, wide @ v[name].double().flatten(), rtol=1e-9)
        assert scalars.forget_sq_norm == pytest.approx(float(v[name].double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("factor", [None, 0.01, 0.1, 0.9, 1.1, 10.0, 100.0])
def test_weighted_sum_is_exact_after_the_revisits(name: str, factor: float | None) -> None:
    moments, v, g = collected(factor)
    w, delta = moments.weighted_sum(name)
    revisit = WeightedSum({name: v[name]}, {name: moments.to_revisit(name, delta)}, COUNT)
    for _, gradients, where in batches({name: g[name]}, revisit.samples()):
        revisit.observe(name, gradients, where)
    exact = exact_weighted_sum(g[name], v[name], DAMPING)
    error = float((w.double() + revisit.total[name].double() - exact).norm()) / float(v[name].double().norm())
    assert error <= 2e-6  # what is let go, REVISIT_TOLERANCE, and the float32 sums


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_without_the_revisits_it_is_not(name: str, factor: float) -> None:
    moments, v, g = collected(factor)
    w, delta = moments.weighted_sum(name)
    error = float((w.double() - exact_weighted_sum(g[name], v[name], DAMPING)).norm()) / float(v[name].double().norm())
    assert error > 2e-6 and bool(moments.to_revisit(name, delta).any())


def test_small_gradients_are_what_is_visited_again() -> None:
    moments, _, _ = collected(1.1)
    _, delta = moments.weighted_sum("matrix")
    again = moments.to_revisit("matrix", delta) != 0
    small = torch.zeros(COUNT, dtype=torch.bool)
    small[::3] = True
    assert bool(again.any()) and not bool((again & ~small).any())


@pytest.mark.parametrize("name", list(SHAPES))
def test_what_is_not_visited_again_is_below_the_tolerance_in_all(name: str) -> None:
    moments, v, _ = collected(3.0)
    _, delta = moments.weighted_sum(name)
    left = delta - moments.to_revisit(name, delta)
    total = float((left.abs() * moments.q[name].sqrt()).sum()) / COUNT
    assert total <= REVISIT_TOLERANCE * float(v[name].double().norm()) * (1 + 1e-6)


def test_expansion_spares_small_tensors_the_revisits() -> None:
    moments, _, _ = collected(1.1)
    again = moments.to_revisit("norm", moments.weighted_sum("norm")[1])
    moments.sums["norm"] = moments.sums["norm"][:1]
    without = moments.to_revisit("norm", moments.weighted_sum("norm")[1])
    assert int((again != 0).sum()) < int((without != 0).sum())


@pytest.mark.parametrize("tolerance", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("common", [0.0, 0.3])
def test_partial_sums_narrow_the_bracket_and_keep_the_exact_norm_in_it(tolerance: float, common: float) -> None:
    """Retain gradients with and without a part in common, in a tensor too large for the expansion."""
    generator = torch.Generator().manual_seed(3)
    size = EXPANSION_NUMEL + 8
    v = {"t": torch.randn(size, generator=generator)}
    shared = torch.randn(size, generator=generator)
    g = torch.randn(COUNT, size, generator=generator) + common * shared
    near = torch.rand(COUNT, generator=generator) * 0.2
    g += near[:, None] * v["t"] * torch.where(torch.arange(COUNT) % 2 == 0, 1.0, -1.0)[:, None]
    moments = RetainMoments(v, COUNT, DAMPING, weighted=v, tolerance=tolerance)
    for name, gradients, where in batches({"t": g}):
        moments.observe(name, gradients, where)
    some = moments.summed["t"]
    cosine = (moments.d["t"].abs() / (moments.q["t"].sqrt() * v["t"].double().norm())) / tolerance**0.5
    assert bool(some.any()) and torch.equal(some, cosine >= 1.25)
    exact = exact_weighted_sum(g, v["t"], DAMPING)
    norm = float((v["t"].double() - exact).norm()) / moments.scalars("t").lambda_
    low, high = moments.partial_bracket("t")
    wide_low, wide_high = moments.scalars("t").bracket()
    assert low <= norm <= high and wide_low <= norm <= wide_high
    assert high - low < wide_high - wide_low


def test_samples_without_gradient_and_tensors_without_any() -> None:
    v = {"a": torch.ones(4), "b": torch.ones(4)}
    moments = RetainMoments(v, 3, DAMPING, weighted=v)
    moments.observe("a", DenseGradients(torch.zeros(2, 4)), torch.tensor([0, 1]))
    assert moments.estimate["a"] == 0.0
    moments.observe("a", DenseGradients(torch.tensor([[1.0, 2.0, 0.0, 0.0]])), torch.tensor([2]))
    w, delta = moments.weighted_sum("a")
    exact = exact_weighted_sum(torch.tensor([[0.0] * 4, [0.0] * 4, [1.0, 2.0, 0.0, 0.0]]), v["a"], DAMPING)
    left = delta[2] / 3 * torch.tensor([1.0, 2.0, 0.0, 0.0])
    assert torch.allclose(w.double() + left, exact, atol=1e-6)
    assert delta[:2].tolist() == [0.0, 0.0]  # no gradient, no part
    w, delta = moments.weighted_sum("b")
    assert not w.any() and not delta.any()


def test_weighted_sum_visits_only_samples_with_a_weight() -> None:
    weights = {"a": torch.tensor([0.0, 2.0, 0.0, 0.0]).double(), "b": torch.tensor([0.0, 0.0, 0.0, -1.0]).double()}
    statistic = WeightedSum({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}, weights, 4)
    assert statistic.samples() == [1, 3] and set(statistic.total) == {"a", "b"}
    for name in ("a", "b"):
        statistic.observe(name, DenseGradients(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), torch.tensor([1, 3]))
    assert statistic.total["a"].tolist() == [0.5, 1.0] and statistic.total["b"].tolist() == [-0.75, -1.0]
    assert WeightedSum({}, {}, 4).samples() == []


@pytest.mark.parametrize("late", [False, True])
def test_parts_around_the_first_batch_of_one_add_up_to_the_whole(late: bool) -> None:
    """Two processes; `late`, a tensor that the first batch does not reach is left to the samples' second visit."""
    v, g = mixed_scales()
    parts = [RetainMoments(v, COUNT, DAMPING, weighted=v) for _ in range(2)]
    whole = RetainMoments(v, COUNT, DAMPING, weighted=v)
    every = list(batches(g))
    first = [batch for batch in every if torch.equal(batch[2], every[0][2])]
    reached = [batch for batch in first if not (late and batch[0] == "norm")]
    for batch in reached:
        parts[0].observe(*batch)
    led = parts[0].lead()
    for part in parts:
        part.follow(led)
    others = [batch for batch in every if not any(batch is one for one in reached)]
    for number, batch in enumerate(others):
        parts[number % 2].observe(*batch)
    for batch in [*reached, *others]:
        whole.observe(*batch)
    added = RetainMoments(v, COUNT, DAMPING, weighted=v)
    one, two = (part.state() for part in parts)
    alike = {name for name in one if name.startswith(added.alike)}
    assert all(torch.equal(one[name], two[name]) for name in alike) and len(alike) == len(v)
    added.load({name: t if name in alike else t + two[name] for name, t in one.items()})
    for name in SHAPES:
        assert torch.equal(added.q[name], whole.q[name]) and torch.equal(added.d[name], whole.d[name])
        (w, delta), exact = added.weighted_sum(name), exact_weighted_sum(g[name], v[name], DAMPING)
        if late and name == "norm":
            assert not bool(w.any()) and not bool(added.summed[name].any())
            assert torch.equal(delta, whole.scalars(name).coefficients())
            continue
        assert added.estimate[name] == whole.estimate[name]
        wanted, left = whole.weighted_sum(name)
        assert torch.allclose(delta, left, rtol=1e-9, atol=1e-12 * float(left.abs().max()))
        assert float((w - wanted).norm()) <= 1e-6 * float(exact.norm())
