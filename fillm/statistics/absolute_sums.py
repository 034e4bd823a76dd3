"""Sums of absolute inner products, freed from what a sketch's noise adds to every one of them.

Absolute values cannot be averaged free of noise. What is known is the noise of each, and how all of them are spread:
the cosines of all pairs are fitted by a mixture of normal distributions around 0 of many widths (adaptive shrinkage,
Stephens, Biostatistics 18(2), 2017), and each pair counts with the mean of its absolute value given what was seen.
"""

import math

import torch
from torch import Tensor

from fillm.statistics.estimates import BAR, Estimate
from fillm.statistics.gram import float64_blocks
from fillm.statistics.gram_form import InnerProducts
from fillm.statistics.rounding import ROUNDING

WIDTHS = 16  # of the mixture beside 0: from a quarter of the noise's in steps of the root of 2
ROUNDS = 100  # of expectation and maximisation
MOST_FITTED = 20000  # pairs that the mixture is fitted to
BLOCK = 1 << 16  # pairs that are shrunk at a time
# Of what was taken off, the part that a bar allows for: as much as covered the errors of docs/compression.md.
DOUBT, DOUBT_TWO_SIDED = 0.35, 0.8


def mean_absolute(products: InnerProducts) -> Estimate:
    """`(1/m) sum_j sum_i |d_ij|`, what `first-order` scores by: one number, [1]."""
    cross = products.cross
    total, count = cross.abs().sum()[None], max(1, cross.shape[1])
    noise = float(products.noise.mean()) if products.noise.numel() else 0.0
    weight = (products.q[:, None] * products.squares).sqrt().flatten()
    there = weight > 0
    if noise == 0.0 or not bool(there.any()):
        return Estimate(total / count, _rounding_error(products)[None] / count)
    weight, cosine = weight[there], cross.flatten()[there] / weight[there]
    widths = torch.cat([torch.zeros(1), 2.0 ** (torch.arange(WIDTHS) / 2.0 - 2.0)]).double() * noise**0.5
    step = -(-cosine.numel() // MOST_FITTED)
    shares = _fitted(cosine[::step], weight[::step], widths, noise)
    kept = sum(
        float((w * _mean_absolute_given(x, widths, shares, noise)).sum())
        for x, w in zip(cosine.split(BLOCK), weight.split(BLOCK), strict=True)
    )
    doubt = DOUBT_TWO_SIDED if products.halves is not None else DOUBT
    error = torch.hypot(doubt / BAR * (total - kept).clamp(min=0.0), _noise_left(products, noise))
    return Estimate(torch.full_like(total, kept) / count, error / count)


def _noise_left(products: InnerProducts, noise: float) -> Tensor:
    """One standard error of `sum_ij s_ij d_ij` with the signs as they are, a scalar: what does not average out.

    Noise of `d_ij` and `d_i'j'` has the covariance `noise K_ii' <v_j, v_j'>`: pairs that are few, or alike, share it.
    """
    signs = products.cross.sign()
    of_sums = signs.T @ products.gram.product(signs)  # of sum_i s_ij g_i among themselves, [m, m]
    among = products.targets.part(torch.arange(signs.shape[1]))
    return (noise * (of_sums * among).sum().clamp(min=0.0)).sqrt()


def _rounding_error(products: InnerProducts) -> Tensor:
    """One standard error of the sum, from gradients kept in bfloat16; a scalar, 0 where they are not."""
    variance = torch.zeros((), dtype=torch.float64)
    if products.primal is not None and products.primal[0].dtype == torch.bfloat16:
        (rows, v), signs = products.primal, products.cross.sign()
        for start, block in float64_blocks(rows):
            variance += block.mul_(signs[start : start + len(block)] @ v.T).square_().sum()
    return ROUNDING * variance.sqrt()


def _likelihood(x: Tensor, widths: Tensor, noise: float) -> Tensor:
    """Of every value under every width, up to a common factor: [p], [g] -> [p, g]."""
    variance = widths.square() + noise
    return torch.exp(-0.5 * x[:, None].square() / variance) / variance.sqrt()


def _fitted(x: Tensor, weight: Tensor, widths: Tensor, noise: float) -> Tensor:
    """The share of each width, [g], by expectation and maximisation; pairs count by their weight."""
    likelihood, weight = _likelihood(x, widths, noise), weight / weight.sum()
    shares = torch.full_like(widths, 1.0 / widths.numel())
    for _ in range(ROUNDS):
        members = likelihood * shares
        shares = weight @ (members / members.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny))
    return shares


def _mean_absolute_given(x: Tensor, widths: Tensor, shares: Tensor, noise: float) -> Tensor:
    """The mean of `|c|` given `c + noise = x`: under every width a normal distribution, folded at 0. [p]."""
    variance = widths.square() + noise
    members = _likelihood(x, widths, noise) * shares
    members = members / members.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    mean = x[:, None] * widths.square() / variance
    spread = (widths.square() * noise / variance).sqrt().clamp(min=1e-300)
    folded = spread * math.sqrt(2.0 / math.pi) * torch.exp(-0.5 * (mean / spread).square())
    return (members * (folded + mean * torch.erf(mean / (spread * math.sqrt(2.0))))).sum(1)
