"""The bracket of method.md (3b) against the exact update, and which tensors it does not certify."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fillm.statistics import BRACKET_SLACK, Scalars, relative_width, uncertified

INF = math.inf


def exact_update(g: Tensor, v: Tensor, damping: float) -> tuple[float, Tensor]:
    """Equations (1) and (2) as they stand, g [n, P] and v [P] in float64: lambda and u."""
    n, numel = g.shape
    lambda_ = damping * sum(float((row**2).mean()) for row in g) / n
    u = torch.zeros(numel, dtype=torch.float64)
    for row in g:
        u -= (v - row * float(row @ v) / (lambda_ + float(row @ row))) / (n * lambda_)
    return lambda_, u


def scalars_of(g: Tensor, v: Tensor, damping: float = 0.1) -> Scalars:
    return Scalars(v.numel(), float(v @ v), (g**2).sum(1), g @ v, damping)


@st.composite
def gradients(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """g [n, P], v [P], damping: of mixed scales, some zero, some parallel to v."""
    n, numel = draw(st.integers(1, 20)), draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    v = torch.randn(numel, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-8, 4))
    g = torch.randn(n, numel, generator=generator, dtype=torch.float64)
    shapes = draw(st.lists(st.sampled_from(["any", "zero", "parallel", "tiny"]), min_size=n, max_size=n))
    for row, shape in enumerate(shapes):
        if shape == "zero":
            g[row] = 0.0
        elif shape == "parallel":
            g[row] = v * draw(st.sampled_from([-3.0, 0.01, 1.0, 1e3]))
        elif shape == "tiny":
            g[row] *= 1e-4
    if draw(st.integers(0, 9)) == 0:
        v = torch.zeros_like(v)
    return g, v, draw(st.sampled_from([1e-4, 0.1, 10.0]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(gradients())
def test_bracket_contains_the_exact_norm(case: tuple[Tensor, Tensor, float]) -> None:
    g, v, damping = case
    scalars = scalars_of(g, v, damping)
    low, high = scalars.bracket()
    if not v.any():
        assert (low, high) == (0.0, 0.0)
    elif not g.any():
        assert (low, high) == (INF, INF)
    else:
        lambda_, u = exact_update(g, v, damping)
        assert scalars.lambda_ == pytest.approx(lambda_, rel=1e-12)
        assert low <= float(u.norm()) <= high
        assert scalars.gain == pytest.approx(-float(v @ u), rel=1e-6, abs=1e-9 * float(v @ v) / lambda_)


def random_case(n: int = 5, numel: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(n, numel, generator=generator, dtype=torch.float64)
    return g, torch.randn(numel, generator=generator, dtype=torch.float64)


def test_lower_bound_is_attained_by_gradients_along_v() -> None:
    _, v = random_case()
    g = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)[:, None] * v
    _, u = exact_update(g, v, 0.1)
    assert scalars_of(g, v).bracket()[0] == pytest.approx(float(u.norm()), rel=2e-3)


def test_upper_bound_is_attained_by_equal_gradients() -> None:
    g, v = random_case()
    g = g[:1].expand(4, -1)
    _, u = exact_update(g, v, 0.1)
    assert scalars_of(g, v).bracket()[1] == pytest.approx(float(u.norm()), rel=2 * BRACKET_SLACK)


def test_orthogonal_gradients_leave_no_room() -> None:
    g, v = random_case()
    g = g - (g @ v)[:, None] * v / (v @ v)
    low, high = scalars_of(g, v).bracket()
    lambda_, u = exact_update(g, v, 0.1)
    assert relative_width(low, high) < 2.1 * BRACKET_SLACK
    assert float(u.norm()) == pytest.approx(float(v.norm()) / lambda_, rel=1e-12)
    assert low < float(u.norm()) < high


def test_coefficients_at_zero_curvature_are_zero_not_nan() -> None:
    zero = Scalars(4, 1.0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0.1)
    assert zero.coefficients().tolist() == [0.0, 0.0, 0.0] and zero.lambda_ == 0.0 and zero.gain == INF
    empty = Scalars(4, 1.0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 0.1)
    assert empty.lambda_ == 0.0


@pytest.mark.parametrize(
    ("brackets", "failed"),
    [
        ({"a": (1.0, 1.0001), "b": (2.0, 2.0001)}, set()),
        ({"a": (1.0, 1.1), "b": (2.0, 2.0001)}, {"a"}),
        ({"a": (1.0, 1.0005), "b": (1.0004, 1.0009), "c": (2.0, 2.0)}, {"a", "b"}),
        # One that reaches over two others which do not touch each other.
        ({"a": (1.0, 1.0009), "b": (1.0001, 1.0002), "c": (1.0005, 1.0006), "d": (1.001, 1.0011)}, {"a", "b", "c"}),
        # The furthest reach is not the neighbour's.
        ({"wide": (1.0, 3.0), "x": (1.5, 1.5), "y": (2.5, 2.5005), "z": (3.5, 3.5)}, {"wide", "x", "y"}),
        # A chain: each touches the next.
        ({"a": (1.0, 1.0004), "b": (1.0003, 1.0008), "c": (1.0007, 1.0012)}, {"a", "b", "c"}),
        # Borders that touch may be the same number.
        ({"a": (1.0, 1.0005), "b": (1.0005, 1.0009)}, {"a", "b"}),
        # Points: names decide between equal ones.
        ({"a": (0.0, 0.0), "b": (0.0, 0.0), "c": (INF, INF), "d": (INF, INF), "e": (1.0, 1.0)}, set()),
        # An unused tensor and one that may be almost nothing.
        ({"a": (0.0, 0.0), "b": (0.0, 2.0)}, {"a", "b"}),
        ({}, set()),
    ],
)
def test_uncertified(brackets: dict[str, tuple[float, float]], failed: set[str]) -> None:
    assert uncertified(brackets, tolerance=1e-3) == failed


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0, 0, 1, 2, 9])), max_size=8))
def test_tensors_that_pass_can_be_ordered(pairs: list[tuple[int, int]]) -> None:
    """A bracket that shares a number with another is not certified; a point is exact as it stands."""
    brackets = {f"t{i}": (float(low), float(low + width)) for i, (low, width) in enumerate(pairs)}
    failed = uncertified(brackets, tolerance=1e9)
    for one, (low, high) in brackets.items():
        overlaps = any(one != other and low <= b[1] and b[0] <= high for other, b in brackets.items())
        if low < high:
            assert (one in failed) == overlaps, (brackets, failed)
        elif not overlaps:
            assert one not in failed, (brackets, failed)


def test_relative_width() -> None:
    assert relative_width(1.0, 1.0) == 0.0 and relative_width(0.0, 0.0) == 0.0 and relative_width(INF, INF) == 0.0
    assert relative_width(1.0, 3.0) == 1.0 and relative_width(0.0, 1.0) == 2.0
