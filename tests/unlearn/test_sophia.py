"""Sophia-G beside a restatement of the paper's Algorithms 2 and 3 in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fillm import MaskedOptimizer, Sophia
from fillm.errors import UsageError
from tests.unlearn.standin import NET_KINDS, booleans, net, random_mask

RATES = {"lr": 0.02, "betas": (0.9, 0.8), "gamma": 0.5, "eps": 1e-10, "weight_decay": 0.1}


def restated(w, gradients, estimates, chosen):
    """Algorithm 3 as it stands: scalars in Python floats, one weight at a time."""
    w, m, h = w.double().flatten().tolist(), [0.0] * w.numel(), [0.0] * w.numel()
    for g, estimate in zip(gradients, estimates, strict=True):
        for i in chosen.flatten().nonzero()[:, 0].tolist():
            m[i] = 0.9 * m[i] + 0.1 * float(g.flatten()[i])
            if estimate is not None:
                h[i] = 0.8 * h[i] + 0.2 * float(estimate.flatten()[i])
            w[i] -= 0.02 * 0.1 * w[i]
            w[i] -= 0.02 * max(-1.0, min(1.0, m[i] / max(0.5 * h[i], 1e-10)))
    return torch.tensor(w, dtype=torch.float64).view(chosen.shape)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("master", [False, True])
def test_steps_are_those_of_algorithm_3(masked, master):
    torch.manual_seed(3)
    layer = nn.Linear(7, 5, bias=False)
    mask = random_mask(layer, {"weight": "bits"}, 0.5)
    chosen = booleans(layer, mask)["weight"] if masked else torch.ones(5, 7, dtype=torch.bool)
    start, gradients, estimates = layer.weight.detach().clone(), [], []
    inner = Sophia(layer.parameters(), every=2, **RATES)
    optimizer = MaskedOptimizer(inner, mask, layer, master_weights=master) if masked else inner
    generator = torch.Generator().manual_seed(5)
    for step in range(5):
        x, g = torch.randn(6, 7, generator=generator), torch.randn(5, 7, generator=generator)
        assert inner.due == (step % 2 == 0)
        estimates.append(None)
        if inner.due:
            seed = torch.Generator().manual_seed(step)
            optimizer.estimate(lambda x=x: layer(x), seed)
            # Algorithm 2 in float64, with the labels that were drawn.
            p = layer(x).detach().softmax(-1)
            labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(step))[:, 0]
            errors = p.double() - F.one_hot(labels, 5)
            estimates[-1] = 6 * (errors.T @ x.double() / 6) ** 2
        layer.weight.grad = g.clone()
        optimizer.step()
        gradients.append(g.double())
    want = restated(start, gradients, estimates, chosen)
    torch.testing.assert_close(layer.weight.detach().double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.weight.detach()[~chosen], start[~chosen])


def test_the_estimate_is_in_expectation_the_gauss_newton_diagonal():
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, dtype=torch.float64), nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    p = (x @ w.detach().T).softmax(-1)
    # For a linear layer the Gauss-Newton diagonal of the mean cross-entropy is mean_t p (1 - p) x^2.
    want = torch.einsum("to,ti->oi", p * (1 - p), x.square()) / 4
    optimizer = Sophia([w], betas=(0.9, 0.0))
    generator, draws, total = torch.Generator().manual_seed(1), 4000, torch.zeros(5, 3, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for _ in range(draws):
        optimizer.estimate(lambda: x @ w.T, generator)
        h = optimizer.state[w]["hessian"].view(5, 3)
        total += h
        squares += h.square()
    mean = total / draws
    error = ((squares / draws - mean.square()) / draws).sqrt()
    assert bool(((mean - want).abs() < 5 * error).all())


def test_several_passes_are_averaged():
    torch.manual_seed(4)
    layer, rows = nn.Linear(7, 5, bias=False), torch.randn(9, 7)
    mask = random_mask(layer, {"weight": "bits"}, 0.5)
    cuts, want, seed = (rows[:2], rows[2:]), torch.zeros(5, 7, dtype=torch.float64), torch.Generator().manual_seed(6)
    for x in cuts:
        p = layer(x).detach().softmax(-1)
        errors = p.double() - F.one_hot(torch.multinomial(p, 1, generator=seed)[:, 0], 5)
        want += 0.5 * 0.01 * len(x) * (errors.T @ x.double() / len(x)) ** 2
    dense = Sophia(layer.parameters(), betas=(0.9, 0.99))
    masked = MaskedOptimizer(Sophia(layer.parameters(), betas=(0.9, 0.99)), mask, layer)
    assert masked.due and not MaskedOptimizer(torch.optim.SGD(layer.parameters()), mask, layer).due
    for optimizer in (dense, masked):
        passes = [lambda x=x: layer(x) for x in cuts]
        optimizer.estimate(iter(passes), torch.Generator().manual_seed(6))
    chosen = booleans(layer, mask)["weight"]
    torch.testing.assert_close(dense.state[layer.weight]["hessian"].double(), want.flatten(), rtol=1e-5, atol=1e-9)
    (state,) = masked.state.values()
    torch.testing.assert_close(state["hessian"].double(), want[chosen], rtol=1e-5, atol=1e-9)


def test_an_estimate_leaves_gradients_and_what_is_not_selected_alone():
    model = net()
    mask = random_mask(model, NET_KINDS)
    inner = Sophia(model.parameters())
    optimizer = MaskedOptimizer(inner, mask, model)
    optimizer.estimate(lambda: model(torch.ones(4, 13)))
    assert all(p.grad is None for p in model.parameters())
    assert sum(s["hessian"].numel() for s in inner.state.values()) == sum(e.count for e in mask.values())
    assert inner.due  # until a step was taken
    for p in model.parameters():
        p.requires_grad_(p is model[4].weight)
    optimizer.estimate(lambda: model(torch.ones(4, 13)))  # asks nothing of frozen tensors


def test_bfloat16_weights_have_float32_state_and_survive_loading():
    model = nn.Linear(8, 4, dtype=torch.bfloat16)
    optimizer = Sophia(model.parameters(), lr=0.01)
    optimizer.estimate(lambda: model(torch.ones(3, 8, dtype=torch.bfloat16)))
    model(torch.ones(3, 8, dtype=torch.bfloat16)).float().square().sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert {s.dtype for state in optimizer.state.values() for s in state.values()} == {torch.float32}
    again = Sophia(model.parameters(), lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    assert {s.dtype for state in again.state.values() for s in state.values()} == {torch.float32}
    again.step()


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"lr": math.nan}, {"eps": 0.0}, {"gamma": -0.1}, {"betas": (0.9, 1.0)}, {"every": 0}]
)
def test_rates_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError, match="Sophia"):
        Sophia([nn.Parameter(torch.ones(2))], **wrong)


@pytest.mark.parametrize(
    "logits", [torch.zeros(0, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3)], ids=lambda x: str(x.shape)
)
def test_logits_that_say_nothing_are_refused(logits):
    with pytest.raises(UsageError, match="the estimate wants logits"):
        Sophia([nn.Parameter(torch.ones(2))]).estimate(lambda: logits)
