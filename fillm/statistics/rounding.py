"""What rounding gradients to bfloat16 does to the answers they give, to first order.

An entry is off by a relative error of its own, so an answer `f` has the variance
`rho^2 sum_ip (g_ip df/dg_ip)^2`. Of everything asked here the derivative is a sum of a few outer products,
`df/dg_ip = sum_t a_i^t s_p^t`, and no gradient is formed anew. `r = v - w` is what the retain set leaves of v.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fillm.statistics.gram import RowsGram, float64_blocks
from fillm.statistics.gram_form import InnerProducts, Step, woodbury_step

# Root mean square of the relative error: the distance between neighbours is 2^-7 of the power of two below, and
# mantissas are taken to lie as those of numbers of all sizes do, where the mean of 1/mantissa^2 is 3 / (8 ln 2).
ROUNDING = 2.0**-7 * math.sqrt(3.0 / (12.0 * 8.0 * math.log(2.0)))
Terms = Sequence[tuple[Tensor, Tensor]]  # a [n, m] and s [P, m] of every outer product


def rounding_variance(rows: Tensor, terms: Terms) -> Tensor:
    """`rho^2 sum_ip (g_ip sum_t a_i^t s_p^t)^2`: rows [n, P] -> [m], float64."""
    pairs = [(a * b, s * t) for a, s in terms for b, t in terms]
    out = torch.zeros(terms[0][1].shape[1], dtype=torch.float64)
    for start, block in float64_blocks(rows):
        squares, stop = block.square_(), start + len(block)
        for of_rows, of_columns in pairs:
            out += (of_rows[start:stop] * (squares @ of_columns)).sum(0)
    return ROUNDING**2 * out.clamp(min=0.0)


def with_rounding(step: Step, products: InnerProducts, lambda_: float, curvature: str) -> Step:
    """The errors of a step that was computed from rounded gradients; lengths `q_i` are exact.

    Args:
        step: the answer.
        products: of one tensor, whose gradients are at hand.
        lambda_: as the step had it.
        curvature: `datainf` or `woodbury`.
    """
    rows, v = products.primal
    gram, n = RowsGram(rows, torch.ones_like(products.q)), max(1, len(rows))
    rest = v - gram.combined(step.coefficients) / n
    own = gram.times(rest)  # <g_i, r>
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    mean = gram.combined(ones) / n  # of the retain gradients
    if curvature == "woodbury":
        # dr = -(F + lambda I)^-1 dF r with dF = (1/n) sum_i (dg_i g_i^T + g_i dg_i^T)
        again, pull = _damped(products, lambda_, torch.cat([rest, mean], 1)).split([v.shape[1], 1], 1)
        turned = 2.0 * again - rest
        parts = (
            ((2.0 / lambda_ * own, again), (2.0 / lambda_ * gram.times(again), rest)),
            ((own, turned), (gram.times(turned), rest)),
            ((ones.expand_as(own), rest), (-own / lambda_, pull), (-gram.times(pull) / lambda_, rest)),
        )
    else:
        # dr = -(1/n) sum_i (<v, dg_i> / (lambda + q_i) g_i + c_i dg_i)
        weight, c = 1.0 / (lambda_ + products.q)[:, None], step.coefficients
        curved = gram.combined(own) / n  # F r
        parts = (
            ((2.0 * weight * own, v), (2.0 * c, rest)),
            ((2.0 * own, rest), (-2.0 * weight * gram.times(curved), v), (-2.0 * c, curved)),
            ((ones.expand_as(own), rest), (-weight * gram.times(mean), v), (-c, mean)),
        )
    of_rest, of_square, of_mean = (
        rounding_variance(rows, [(a, s.expand(-1, v.shape[1])) for a, s in terms]).sqrt() / n for terms in parts
    )
    error = of_rest / products.squares.clamp(min=torch.finfo(torch.float64).tiny)
    error = torch.where(products.squares > 0, error, 0.0).clamp(max=1.0)
    return replace(step, error=error, dots_error=of_square, mean_error=of_mean)


def _damped(products: InnerProducts, lambda_: float, right: Tensor) -> Tensor:
    """`lambda (F + lambda I)^-1 right`, [P, m]."""
    rows = products.primal[0]
    gram = RowsGram(rows, torch.ones_like(products.q))
    asked = replace(
        products, cross=gram.times(right), squares=right.square().sum(0), noise=torch.zeros(right.shape[1]).double(),
        gram=gram, primal=(rows, right),
    )  # fmt: skip
    return right - gram.combined(woodbury_step(asked, lambda_).coefficients) / max(1, len(rows))
