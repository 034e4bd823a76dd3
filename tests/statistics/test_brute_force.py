"""The brute-force formulas on values worked out by hand."""

import math

import pytest
import torch

from tests.statistics import brute_force

# Two retain samples along the axes, of squared norm 4 and 1, two forget samples with mean (1, 2); P = 2, n = 2.
G = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
F = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
V = torch.tensor([1.0, 2.0])
DAMPING = 0.8  # lambda = 0.8 * mean(4/2, 1/2) = 1


def exactly(value: float) -> object:
    return pytest.approx(value, rel=1e-14)


def test_mean_and_damping() -> None:
    assert brute_force.mean_forget(F).tolist() == [1.0, 2.0]
    assert brute_force.damping_of(G, DAMPING) == exactly(1.0)


@pytest.mark.parametrize("step", [brute_force.datainf_step, brute_force.datainf_step_as_printed])
def test_datainf(step: brute_force.Step) -> None:
    # (v - g_1 * 2/5) = (1/5, 2); (v - g_2 * 2/2) = (1, 1); minus their mean.
    assert step(G, V, 1.0).tolist() == exactly([-0.6, -1.5])
    assert brute_force.score(F, G, DAMPING, step) == exactly(math.sqrt(0.36 + 2.25))


def test_both_forms_of_datainf_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    g, v = torch.randn(5, 7, generator=generator), torch.randn(7, generator=generator)
    dense, printed = (step(g, v, 0.3) for step in (brute_force.datainf_step, brute_force.datainf_step_as_printed))
    assert torch.allclose(dense, printed, rtol=1e-12, atol=1e-12)


def test_woodbury() -> None:
    # (1/2) diag(4, 1) + I = diag(3, 1.5)
    assert brute_force.woodbury_step(G, V, 1.0).tolist() == exactly([-1 / 3, -4 / 3])
    assert brute_force.score(F, G, DAMPING, brute_force.woodbury_step) == exactly(math.sqrt(17) / 3)


def test_woodbury_with_gradients_that_are_not_orthogonal() -> None:
    # One sample (1, 1): the inverse of [[2, 1], [1, 2]] is [[2, -1], [-1, 2]] / 3; and DataInf is exact for one sample.
    g = torch.tensor([[1.0, 1.0]])
    for step in (brute_force.woodbury_step, brute_force.datainf_step, brute_force.datainf_step_as_printed):
        assert step(g, V, 1.0).tolist() == pytest.approx([0.0, -1.0], abs=1e-15)


def test_every_forget_sample_alone() -> None:
    # f_1 = (2, 1): (2 - 2 * 4/5, 1), (2, 1/2) -> (1.2, 0.75); f_2 = (0, 3): (0, 3), (0, 3/2) -> (0, 2.25).
    assert brute_force.scores_per_sample(F, G, DAMPING) == exactly([math.hypot(1.2, 0.75), 2.25])
    # diag(3, 1.5)^-1
    found = brute_force.scores_per_sample(F, G, DAMPING, brute_force.woodbury_step)
    assert found == exactly([math.hypot(2 / 3, 2 / 3), 2.0])


def test_first_order() -> None:
    assert brute_force.first_order(F, G) == exactly((4 + 1 + 0 + 3) / 2)
    assert brute_force.first_order(-F, G) == exactly(4.0)


def test_memflex() -> None:
    # mean g = (1, 1/2)
    cosine, magnitude = brute_force.memflex(F, G)
    assert cosine == exactly(2.0 / math.sqrt(5 * 1.25)) and magnitude == exactly(1.5)
    assert brute_force.memflex(F, torch.zeros(2, 2))[0] == 0.0


def test_objectives() -> None:
    u = torch.tensor([-0.6, -1.5], dtype=torch.float64)
    assert brute_force.gain(V, u) == exactly(3.6)
    assert brute_force.retain_dots(G, u) == exactly([-1.2, -1.5])
    assert brute_force.damage(G, u) == exactly(0.5 * (1.44 + 2.25) / 2)
    eta = 0.01 / 3.6
    assert brute_force.trade_off(G, V, u) == exactly(eta * 1.35 + eta**2 / 2 * 1.845)
    assert brute_force.trade_off(G, V, 5 * u) == exactly(brute_force.trade_off(G, V, u))
    assert brute_force.trade_off(G, V, -u) == float("inf")
