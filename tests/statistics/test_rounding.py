"""What bfloat16 does to answers from whole gradients: against autograd, and against what rounding did to them."""

import pytest
import torch
from torch import Tensor

from fillm.capture import SketchMap
from fillm.statistics import BAR, InnerProducts, curved_step, mean_absolute, sketched_products
from fillm.statistics.rounding import ROUNDING

DAMPING = 0.1


def gradients(n: int, m: int, numel: int, seed: int) -> tuple[Tensor, Tensor]:
    """Retain gradients [n, P] and right-hand sides [m, P] with a direction in common, lengths and entries uneven."""
    generator = torch.Generator().manual_seed(seed)
    shared, *_ = torch.randn(1, numel, generator=generator, dtype=torch.float64)
    g = torch.randn(n, numel, generator=generator, dtype=torch.float64) + 0.5 * shared
    g *= torch.randn(n, 1, generator=generator, dtype=torch.float64).exp()
    uneven = torch.randn(numel, generator=generator, dtype=torch.float64).exp()
    v = torch.randn(m, numel, generator=generator, dtype=torch.float64) + 0.5 * shared
    return g * uneven, v * uneven


def kept(g: Tensor, v: Tensor, dtype: torch.dtype) -> InnerProducts:
    """As of a tensor so small that its gradients are kept: rows rounded, lengths exact."""
    to = SketchMap("exact", g.shape[1], (g.shape[1],), 0)
    return sketched_products(to, g.to(dtype), g.square().sum(1), v, v.square().sum(1), g.shape[1])


def direct(g: Tensor, v: Tensor, q: Tensor, lambda_: float, curvature: str) -> Tensor:
    """`rest`, mean square and mean of `lambda <g_i, u>` for one v, from `u` itself; lengths `q` are not g's own."""
    n = len(g)
    if curvature == "woodbury":
        u = -torch.linalg.solve(g.T @ g / n + lambda_ * torch.eye(g.shape[1], dtype=torch.float64), v)
    else:
        u = -(v - g.T @ ((g @ v) / (lambda_ + q)) / n) / lambda_
    s = lambda_ * (g @ u)
    return torch.stack([(lambda_ * u).square().sum() / v.square().sum(), s.square().mean(), s.mean()])


@pytest.mark.parametrize("n, numel", [(5, 17), (23, 6), (1, 3), (9, 9)])
@pytest.mark.parametrize("curvature", ["datainf", "woodbury"])
def test_errors_are_those_of_the_derivatives(n: int, numel: int, curvature: str) -> None:
    g, v = gradients(n, 2, numel, seed=n)
    rounded = g.bfloat16()
    products = kept(g, v, torch.bfloat16)
    lambda_ = products.damping(DAMPING)
    step = curved_step(products, lambda_, curvature)
    for column in range(2):
        at = rounded.double().requires_grad_()
        answers = direct(at, v[column], g.square().sum(1), lambda_, curvature)
        for answer, found in zip(answers, (step.error, step.dots_error, step.mean_error), strict=True):
            (slope,) = torch.autograd.grad(answer, at, retain_graph=True)
            wanted = ROUNDING * (slope * rounded.double()).square().sum().sqrt()
            assert float(found[column]) == pytest.approx(float(wanted), rel=1e-6)
    assert torch.equal(rounded, products.primal[0])


@pytest.mark.parametrize("n, numel", [(40, 24), (25, 130)])
@pytest.mark.parametrize("curvature", ["datainf", "woodbury"])
def test_bars_cover_what_rounding_does(n: int, numel: int, curvature: str) -> None:
    inside, ratios = [], []
    for seed in range(30):
        g, v = gradients(n, 3, numel, seed)
        wide, narrow = kept(g, v, torch.float64), kept(g, v, torch.bfloat16)
        lambda_ = wide.damping(DAMPING)
        truth, found = (curved_step(products, lambda_, curvature) for products in (wide, narrow))
        assert not truth.error.any()
        off = (found.rest - truth.rest).abs() / found.error
        squares = (found.dots.square().mean(0) - truth.dots.square().mean(0)).abs() / found.dots_error
        means = (found.dots.mean(0) - truth.dots.mean(0)).abs() / found.mean_error
        totals = (mean_absolute(narrow).value - mean_absolute(wide).value).abs() / mean_absolute(narrow).error
        ratios += [torch.cat([off, squares, means, totals])]
    ratios = torch.stack(ratios)
    inside = (ratios <= BAR).double().mean(0)
    # Of 30 draws of a normal variable 28 are within 1.9 standard errors; 24 are in all but 1 of 300 tests.
    assert bool((inside >= 0.8).all())
    assert float((ratios <= BAR).double().mean()) >= 0.9
    # The root mean square is 1 where errors are as large as they say.
    assert 0.8 < float(ratios.square().mean().sqrt()) < 1.25


@pytest.mark.parametrize("curvature", ["datainf", "woodbury"])
def test_nothing_to_round_has_no_error(curvature: str) -> None:
    g, v = gradients(6, 2, 11, 0)
    v[1] = 0.0
    step = curved_step(kept(g, v, torch.bfloat16), 0.1, curvature)
    assert float(step.error[0]) > 0.0
    assert float(step.error[1]) == 0.0
    exact = curved_step(kept(g.bfloat16().double(), v, torch.float32), 0.1, curvature)
    assert not exact.error.any()
    assert float(mean_absolute(kept(g, v, torch.float32)).error) == 0.0
