"""Every sketch of a gradient against its variance bound, on gradients of a trained model and on adversaries.

Gaussian factors are kind to a sketch; gradients are not. Those here come from a small network trained until its
activations and loss gradients have structure: rows of dy that nearly vanish, columns of x that all tokens share.
"""

import math
from functools import cache

import pytest
import torch
from fillm_kernels import factored_sketch, outer_sketch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.kernels.ragged import gradients

INPUTS, OUTPUTS, VOCABULARY, TOKENS = 48, 32, 17, 7
Ragged = tuple[Tensor, Tensor, Tensor]


@cache
def trained() -> tuple[Tensor, Tensor]:
    """Inputs and loss gradients of a hidden layer after training, [5 * TOKENS, I] and [5 * TOKENS, O]."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((VOCABULARY, INPUTS), (INPUTS, INPUTS), (OUTPUTS, INPUTS), (VOCABULARY, OUTPUTS))
    embedding, mixing, layer, head = (
        (torch.randn(size, generator=generator) / math.sqrt(size[1])).requires_grad_() for size in sizes
    )
    first = torch.arange(40)[:, None] % VOCABULARY
    tokens = (first * 3 ** torch.arange(TOKENS + 1) + torch.arange(TOKENS + 1)) % VOCABULARY  # [40, TOKENS + 1]

    def losses(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = embedding[rows[:, :-1]]
        past = read.cumsum(1) / torch.arange(1, TOKENS + 1)[:, None]  # what a causal layer sees
        x = torch.tanh(read + past @ mixing.T)
        hidden = x @ layer.T
        logits = torch.relu(hidden) @ head.T
        return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"), x, hidden

    optimiser = torch.optim.Adam([embedding, mixing, layer, head], lr=0.02)
    before = None
    for _ in range(60):
        loss, _, _ = losses(tokens)
        before = float(loss.detach()) if before is None else before
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    loss, _, _ = losses(tokens)
    assert float(loss.detach()) < 0.5 * before
    loss, x, hidden = losses(tokens[:5])
    (dy,) = torch.autograd.grad(loss, hidden)
    return x.detach().flatten(0, 1), dy.flatten(0, 1)


@cache
def hard_cases() -> Ragged:
    """Samples of one call: of the model whole and token by token, and what a careless map fails on."""
    x, dy = trained()
    one = lambda size, *at: torch.zeros(size).index_fill(0, torch.tensor(at), 1.0)  # noqa: E731
    ones_in, ones_out = torch.ones(INPUTS), torch.ones(OUTPUTS)
    samples: list[tuple[Tensor, Tensor]] = [(x[:7], dy[:7]), (x[7:14], dy[7:14]), (x[14:35], dy[14:35])]
    samples += [(x[t : t + 1], dy[t : t + 1]) for t in (0, 9, 20)]  # rank one, real
    samples += [
        (x[3:4], one(OUTPUTS, 5)[None]),  # a heavy row
        (one(INPUTS, 7)[None], dy[3:4]),  # a heavy column
        (ones_in[None], ones_out[None]),  # a constant
        (ones_in[None], dy[4:5]),
        (torch.stack([one(INPUTS, 40), x[5]]), torch.stack([50 * one(OUTPUTS, 30), dy[5]])),  # one heavy coordinate
        (torch.stack([one(INPUTS, 1), one(INPUTS, 0)]), torch.stack([one(OUTPUTS, 0), one(OUTPUTS, 1)])),
        (x[:7].repeat(3, 1), dy[:7].repeat(3, 1)),  # a sample that says everything thrice
    ]
    lengths = [0, *(len(part) for part, _ in samples)]
    rows, outs = (torch.cat([sample[side] for sample in samples]) for side in (0, 1))
    return rows, outs, torch.tensor(lengths).cumsum(0)


CASES = [
    *((kind, (dim,)) for kind in ("oporp", "countsketch", "sjlt") for dim in (64, 256)),
    *((kind, dims) for kind in ("factored", "factored-sjlt") for dims in ((8, 8), (16, 16), (8, 32))),
    *(("tensorsketch", (dim,)) for dim in (64, 128, 256)),
]


@pytest.mark.parametrize(("kind", "dims"), CASES)
def test_inner_products_of_real_and_of_hard_gradients_stay_within_the_documented_variance(kind, dims):
    x, dy, offsets = hard_cases()
    formed = gradients(x, dy, offsets).flatten(1)
    exact, squares = formed @ formed.T, formed.square().sum(1)
    sizes = squares[:, None] * squares
    if kind == "tensorsketch":  # docs/kernels/factored_sketch.md
        variance = 11 / dims[0] * sizes
    elif kind.startswith("factored"):
        variance = ((1 + 2 / dims[0]) * (1 + 2 / dims[1]) - 1) * sizes
    else:  # docs/kernels/sketch.md
        variance = (sizes + exact.square()) / dims[0]
    seeds = 600
    mean, square = torch.zeros_like(exact), torch.zeros_like(exact)
    for seed in range(seeds):
        if len(dims) == 1 and kind != "tensorsketch":
            s = outer_sketch(x, dy, offsets, dims[0], kind, seed).double()
        else:
            s = factored_sketch(x, dy, offsets, dims if len(dims) > 1 else dims[0], kind, seed).double()
        error = s @ s.T - exact
        mean += error / seeds
        square += error.square() / seeds
    # A mean of n draws is within 4.5 of its deviations; there are about a hundred pairs. Mean squares of pairs whose
    # entries meet in one map of k are made by n / k events: 2.3 of them at k = 256, more than 5 once in 30 such pairs.
    assert float((mean / variance.sqrt()).abs().max()) < 4.5 / math.sqrt(seeds)
    assert float((square / variance).max()) < 1.6


def test_gradients_of_the_trained_model_are_not_like_random_ones():
    # What makes them hard: few directions hold most of a gradient.
    x, dy = trained()
    whole = gradients(x, dy, torch.arange(6) * TOKENS)
    values = torch.linalg.svdvals(whole.mean(0))
    assert float(values[:3].square().sum() / values.square().sum()) > 0.5  # of 32; random ones hold a quarter
