"""Projected factors: what two halves of the sketches, answered separately, say of the whole."""

import pytest
import torch
from torch import Tensor

from fillm.capture import SketchMap
from fillm.capture.sketching import sketch_dense
from fillm.statistics import (
    BAR,
    DenseGram,
    InnerProducts,
    curved_step,
    datainf_step,
    sketched_products,
    widened,
    woodbury_step,
)

SHAPE = (24, 30)


def gradients(count: int, seed: int) -> Tensor:
    """Matrices of rank 2 on a few directions that all share, [count, O, I]: as of tokens that resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(6, size, generator=generator, dtype=torch.float64) for size in SHAPE]
    mixed = [torch.randn(count, 2, 6, generator=generator, dtype=torch.float64) @ side for side in sides]
    return mixed[0].transpose(1, 2) @ mixed[1]


def exact(g: Tensor, v: Tensor) -> InnerProducts:
    g, v = g.flatten(1), v.flatten(1)
    squares = v.square().sum(1)
    return InnerProducts(g.shape[1], g.square().sum(1), g @ v.T, squares, DenseGram(g @ g.T), torch.zeros_like(squares))


def sketched(g: Tensor, v: Tensor, kind: str, k: int, seed: int) -> InnerProducts:
    to = SketchMap.of(kind, k, "tensor", SHAPE, seed)
    q, squares = (x.flatten(1).square().sum(1) for x in (g, v))
    return sketched_products(to, sketch_dense(g, to), q, sketch_dense(v, to), squares, g[0].numel())


@pytest.mark.parametrize("kind", ["factored", "factored-sjlt"])
@pytest.mark.parametrize("curvature", ["datainf", "woodbury"])
def test_the_halves_take_off_bias_and_cover_what_is_left(kind: str, curvature: str) -> None:
    both = gradients(33, 1)
    g, v = both[:30], both[30:]
    truth = exact(g, v)
    lambda_ = truth.damping(0.1)
    wanted = curved_step(truth, lambda_, curvature).rest
    plain_solve = woodbury_step if curvature == "woodbury" else datainf_step
    plain, found = [], []
    for seed in range(25):
        products = sketched(g, v, kind, 200, seed)
        plain.append(plain_solve(products, lambda_))
        found.append(curved_step(products, lambda_, curvature))
    rest, error, apart = (torch.stack([getattr(step, name) for step in found]) for name in ("rest", "error", "apart"))
    covered = float(((rest - wanted).abs() <= BAR * widened(error, apart)).double().mean())
    bare = torch.stack([step.rest for step in plain])
    bare_covered = (bare - wanted).abs() <= BAR * torch.stack([step.error for step in plain])
    assert covered >= 0.9 and covered >= float(bare_covered.double().mean())
    # What is left of the bias is smaller, within the error of a mean of 25.
    spread = float((rest - wanted).std()) / 25**0.5
    assert abs(float((rest - wanted).mean())) <= abs(float((bare - wanted).mean())) + spread


def test_halves_that_noise_fills_say_nothing() -> None:
    both = gradients(41, 2)
    products = sketched(both[:40], both[40:], "factored", 72, 0)
    lambda_ = products.damping(0.1)
    bare, found = woodbury_step(products, lambda_), curved_step(products, lambda_, "woodbury")
    assert max(float(woodbury_step(half, lambda_).noise_share) for half in products.halves) >= 1.0
    assert bool(found.apart.isnan().all())
    assert torch.equal(found.rest, bare.rest)
    assert bool((found.error >= bare.error.clamp(max=1.0)).all())


def test_one_sided_sketches_have_no_halves() -> None:
    both = gradients(12, 3)
    products = sketched(both[:10], both[10:], "countsketch", 200, 0)
    assert products.halves is None
    bare, found = datainf_step(products, 1.0), curved_step(products, 1.0, "datainf")
    assert torch.equal(found.rest, bare.rest) and torch.equal(found.error, bare.error)
    assert bool(found.apart.isnan().all())


def test_errors_grow_by_what_all_tensors_halves_say() -> None:
    nan = float("nan")
    error = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    apart = torch.tensor([[9.0, 0.5], [7.0, nan], [nan, 0.7]], dtype=torch.float64)
    # Column 0: the mean of 9 and 7 is 8; column 1: 0.6, which makes no error smaller.
    wanted = torch.tensor([[8.0**0.5, 2.0], [3.0 * 8.0**0.5, 4.0], [5.0, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(widened(error, apart), wanted)
    nothing = torch.full_like(error, nan)
    assert torch.equal(widened(error, nothing), error)
