"""Closed forms from inner products against vectors: what `u` itself says, computed entry by entry in float64."""

import pytest
import torch
from torch import Tensor

from fillm.capture import SketchMap
from fillm.statistics import (
    BAR,
    DenseGram,
    InnerProducts,
    RowsGram,
    datainf_step,
    explained,
    mean_absolute,
    sketched_products,
    top_set_confidence,
    woodbury_step,
)

# Both sides are float64 sums of at most 300 terms; the dual of woodbury loses what it divides by n lambda.
EXACT = 1e-9


def gradients(n: int, m: int, numel: int, seed: int = 0, alike: float = 0.5) -> tuple[Tensor, Tensor]:
    """Retain gradients [n, P] of very different lengths that share a direction, and right-hand sides [m, P]."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(numel, generator=generator, dtype=torch.float64)
    g = torch.randn(n, numel, generator=generator, dtype=torch.float64) + alike * shared
    g *= torch.randn(n, 1, generator=generator, dtype=torch.float64).exp()
    return g, torch.randn(m, numel, generator=generator, dtype=torch.float64) + alike * shared


def exact(g: Tensor, v: Tensor, primal: bool = False) -> InnerProducts:
    q, squares = g.square().sum(1), v.square().sum(1)
    both = (g, v.T) if primal else None
    return InnerProducts(g.shape[1], q, g @ v.T, squares, DenseGram(g @ g.T), torch.zeros_like(squares), both)


def datainf_update(g: Tensor, v: Tensor, lambda_: float) -> Tensor:
    """Equation (2) in its first form, sample by sample."""
    u = torch.zeros_like(v)
    for one in g:
        u -= (v - one * (one @ v) / (lambda_ + one @ one)) / (len(g) * lambda_)
    return u


def inverse_update(g: Tensor, v: Tensor, lambda_: float) -> Tensor:
    matrix = g.T @ g / len(g) + lambda_ * torch.eye(g.shape[1], dtype=torch.float64)
    return -torch.linalg.inv(matrix) @ v


@pytest.mark.parametrize("n, numel", [(7, 40), (1, 5), (40, 12)])
@pytest.mark.parametrize("curvature", ["datainf", "woodbury", "primal"])
def test_steps_say_what_the_vector_says(n: int, numel: int, curvature: str) -> None:
    g, v = gradients(n, 3, numel)
    products = exact(g, v, primal=curvature == "primal")
    lambda_ = products.damping(0.1)
    assert lambda_ == pytest.approx(0.1 * float(g.square().mean()), rel=1e-12)
    step = (datainf_step if curvature == "datainf" else woodbury_step)(products, lambda_)
    for column in range(3):
        u = (datainf_update if curvature == "datainf" else inverse_update)(g, v[column], lambda_)
        length = (lambda_ * u).square().sum() / v[column].square().sum()
        torch.testing.assert_close(step.rest[column], length, rtol=EXACT, atol=EXACT)
        gain = -(v[column] @ u)
        torch.testing.assert_close((v[column].square().sum() - step.along[column]) / lambda_, gain, rtol=1e-7, atol=0.0)
        torch.testing.assert_close(step.dots[:, column] / lambda_, g @ u, rtol=1e-7, atol=1e-9)
        w = v[column] + lambda_ * u
        torch.testing.assert_close(step.coefficients[:, column] @ g / n, w, rtol=1e-7, atol=1e-8)
    assert not step.error.any()
    assert not step.noise_share.any()


def test_rows_and_a_dense_matrix_are_the_same_gram_matrix() -> None:
    g, _ = gradients(9, 2, 30)
    scale = torch.linspace(0.5, 2.0, 9, dtype=torch.float64)
    rows, dense = RowsGram(g, scale), DenseGram((g * scale[:, None]) @ (g * scale[:, None]).T)
    c, some = (
        torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        torch.tensor([4, 0, 8]),
    )
    torch.testing.assert_close(rows.product(c), dense.product(c))
    torch.testing.assert_close(rows.square(c), dense.square(c))
    torch.testing.assert_close(rows.part(some), dense.part(some))


def test_a_sample_without_a_gradient_changes_only_the_mean() -> None:
    g, v = gradients(5, 1, 20)
    g[2] = 0.0
    lambda_ = exact(g, v).damping(0.1)
    for solve, update in ((datainf_step, datainf_update), (woodbury_step, inverse_update)):
        length = (lambda_ * update(g, v[0], lambda_)).square().sum() / v.square().sum()
        torch.testing.assert_close(solve(exact(g, v), lambda_).rest[0], length, rtol=EXACT, atol=EXACT)


def test_a_right_hand_side_of_zero_is_left_alone() -> None:
    g, v = gradients(5, 2, 20)
    v[1] = 0.0
    for solve in (datainf_step, woodbury_step):
        step = solve(exact(g, v), exact(g, v).damping(0.1))
        assert float(step.rest[1]) == 1.0
        assert bool(step.dots[:, 1].eq(0).all())
        assert bool(torch.isfinite(step.error).all())


def sketched(g: Tensor, v: Tensor, k: int, seed: int) -> InnerProducts:
    """The same from a Gaussian sketch made here."""
    matrix = torch.randn(g.shape[1], k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / k**0.5
    to = SketchMap("gaussian", k, (g.shape[1],), 0)
    return sketched_products(to, g @ matrix, g.square().sum(1), v @ matrix, v.square().sum(1), g.shape[1])


@pytest.mark.parametrize("n, numel, k, alike", [(60, 1200, 512, 0.0), (60, 1200, 512, 0.5), (30, 900, 256, 2.0)])
@pytest.mark.parametrize("solve", [datainf_step, woodbury_step])
def test_noise_is_taken_off_and_its_size_is_known(n: int, numel: int, k: int, alike: float, solve) -> None:
    g, v = gradients(n, 1, numel, seed=3, alike=alike)
    truth = solve(exact(g, v), exact(g, v).damping(0.1))
    steps = [solve(sketched(g, v, k, seed), exact(g, v).damping(0.1)) for seed in range(40)]
    rest, error = (torch.stack([getattr(step, name)[0] for step in steps]) for name in ("rest", "error"))
    spread = float(rest.std())
    # The mean of 40 estimates: 4 of its standard errors, and the second order of the sketch's noise.
    assert abs(float((rest - truth.rest[0]).mean())) < 4.0 * spread / 40**0.5 + 4.0 / k
    assert 0.6 * spread < float(error.mean()) < 1.8 * spread
    assert float(((rest - truth.rest[0]).abs() <= BAR * error).double().mean()) >= 0.8
    along = torch.stack([step.along[0] for step in steps]) / v.square().sum()
    wanted = float(truth.along[0] / v.square().sum())
    assert abs(float(along.mean()) - wanted) < 4.0 * float(along.std()) / 40**0.5 + 4.0 / k
    raw = torch.stack([step.dots[:, 0].square().mean() - step.dots_noise[0] for step in steps])
    wanted = float(truth.dots[:, 0].square().mean())
    assert abs(float(raw.mean()) / wanted - 1.0) < 4.0 * float(raw.std()) / wanted / 40**0.5 + 0.05


@pytest.mark.parametrize("solve", [datainf_step, woodbury_step])
def test_one_sample_has_the_noise_of_its_dot_product(solve) -> None:
    g, v = gradients(1, 1, 600, seed=6)
    lambda_ = exact(g, v).damping(0.1)
    wanted = float(solve(exact(g, v), lambda_).dots[0, 0])
    found = [solve(sketched(g, v, 64, seed), lambda_) for seed in range(400)]
    excess = torch.stack([step.dots[0, 0] ** 2 for step in found]).mean() - wanted**2
    # A mean of 400 squares of about normal numbers is known to 7 %, and the sketch's second order adds 1/64.
    assert float(torch.stack([step.dots_noise[0] for step in found]).mean()) == pytest.approx(float(excess), rel=0.3)
    spread = torch.stack([step.dots[0, 0] for step in found]).std()
    assert float(torch.stack([step.mean_error[0] for step in found]).mean()) == pytest.approx(float(spread), rel=0.2)


def test_halves_tell_how_good_a_two_sided_sketch_is() -> None:
    g, v = gradients(50, 2, 400, alike=0.0)
    draw = torch.Generator().manual_seed(5)
    # Two halves of 20 numbers each are as noisy as 40 of a plain sketch; the map says 400.
    parts = [torch.randn(400, 20, generator=draw, dtype=torch.float64) / 40**0.5 for _ in range(2)]
    padded = torch.cat([torch.nn.functional.pad(part, (0, 180)) for part in parts], 1)
    to = SketchMap("factored", 400, (20, 20), 0, halves=2)
    found = sketched_products(to, g @ padded, g.square().sum(1), v @ padded, v.square().sum(1), 400)
    # The mean of 50 squares that are correlated by the shared sketch of v: 50 %.
    assert bool(((found.noise > 0.5 / 40) & (found.noise < 1.5 / 40)).all())


def test_bins_that_share_the_coordinates_are_less_noisy() -> None:
    numel, k, draws = 60, 30, 2000
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, numel, generator=generator, dtype=torch.float64)
    y -= (x @ y) / (x @ x) * x  # the stretch to exact lengths is of no account for gradients at right angles
    products = []
    for _ in range(draws):
        order = torch.randperm(numel, generator=generator)
        signs = 2.0 * torch.randint(2, (numel,), generator=generator, dtype=torch.float64) - 1.0
        sums = [(part[order] * signs).view(k, numel // k).sum(1) for part in (x, y)]
        products.append(sums[0] @ sums[1])
    measured = float(torch.stack(products).square().mean() / (x.square().sum() * y.square().sum()))
    row = torch.zeros(1, k, dtype=torch.float64)
    square = torch.ones(1, dtype=torch.float64)
    found = sketched_products(SketchMap("oporp", k, (numel,), 0), row, square, row, square, numel)
    # A mean of 2000 squares of about normal numbers is known to 3 %, and 1/k would be twice as much; the products are
    # of single pairs, whose entries the law averages over: 15 %.
    assert float(found.noise[0]) == pytest.approx(measured, rel=0.15)


def test_errors_that_follow_the_values_do_not_pull_the_mean_down() -> None:
    generator = torch.Generator().manual_seed(4)
    truth, size = torch.full((16, 400), 4e-3, dtype=torch.float64), 4e-3
    draw = torch.randn(16, 400, generator=generator, dtype=torch.float64)
    # As of a quadratic form: its error is estimated from the form itself.
    found = explained(truth + size * draw, size * (1.0 + 0.3 * draw).clamp(min=0.4))
    # The mean of 400 columns of 16 is known to 1 % of `size`; each tensor still weighs its own value by its error.
    assert float(found.value.mean()) == pytest.approx(4e-3, rel=0.15)
    assert float(((found.value - truth).abs() <= BAR * found.error).double().mean()) >= 0.9


def test_tensors_weigh_their_corrections_together() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = 1e-3 * (1.0 + 0.3 * torch.rand(40, 1, generator=generator, dtype=torch.float64))
    error = torch.full_like(truth, 5e-3)
    error[0] = 0.0
    noisy = truth + error * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    found = explained(noisy, error)
    assert float(found.value[0]) == float(noisy[0])
    assert float(found.error[0]) == 0.0
    # Together 39 tensors know the mean to 0.8e-3 of 1.15e-3: no estimate is further off than no correction would be.
    assert float((found.value - truth).abs()[1:].max()) <= float(truth.max())
    low, high = found.bounds(0.0, 1.0)
    assert float(((low <= truth) & (truth <= high)).double().mean()) >= 0.9
    sure = explained(noisy, 1e-9 * torch.ones_like(error))
    torch.testing.assert_close(sure.value, noisy.clamp(min=0.0))


def test_mean_absolute_is_exact_or_freed_from_noise() -> None:
    g, v = gradients(40, 6, 2000, alike=0.05)
    products = exact(g, v)
    wanted = float((g @ v.T).abs().sum() / 6)
    assert float(mean_absolute(products).value) == pytest.approx(wanted, rel=1e-12)
    assert float(mean_absolute(products).error) == 0.0
    found = [mean_absolute(sketched(g, v, 256, seed)) for seed in range(20)]
    raw = [float(sketched(g, v, 256, seed).cross.abs().sum() / 6) for seed in range(20)]
    mean = sum(float(one.value) for one in found) / 20
    assert abs(mean / wanted - 1.0) < 0.5 * (sum(raw) / 20 / wanted - 1.0)
    assert sum(abs(float(one.value) - wanted) <= BAR * float(one.error) for one in found) >= 16


def test_confidence_in_the_top_set() -> None:
    value = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert top_set_confidence(value, torch.zeros(4, dtype=torch.float64), 2) == 1.0
    assert top_set_confidence(value, torch.full((4,), 1e-3, dtype=torch.float64), 2) == 1.0
    # Two scores one apart, each with an error of 1: the difference is above 0 with probability Phi(1/sqrt 2) = 0.760.
    pair = top_set_confidence(value[:2], torch.ones(2, dtype=torch.float64), 1)
    assert pair == pytest.approx(0.760, abs=0.04)
    assert top_set_confidence(value, torch.ones(4, dtype=torch.float64), 4) == 1.0
