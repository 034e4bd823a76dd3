"""A curvature's answer, with the errors that its inner products alone do not tell of (docs/method.md, "Compression").

Projected factors make some gradients noisier than others: two halves of the sketches, answered separately, say how
far off the answer is. Gradients that are kept whole but in bfloat16 are off by their rounding.
"""

from dataclasses import replace
from typing import Literal

import torch

from fillm.statistics.gram_form import InnerProducts, Step, datainf_step, woodbury_step
from fillm.statistics.rounding import with_rounding

UNEVEN = 1.5  # times as wide as those of even noise are the errors of projected factors, at least


def curved_step(products: InnerProducts, lambda_: float, curvature: Literal["datainf", "woodbury"]) -> Step:
    """Equation (2), or the true inverse, for every right-hand side.

    Args:
        products: of one tensor.
        lambda_: above 0.
        curvature: which.
    """
    solve = woodbury_step if curvature == "woodbury" else datainf_step
    step = solve(products, lambda_)
    if products.halves is not None:
        return _by_halves(step, *(solve(half, lambda_) for half in products.halves))
    if products.primal is not None and products.primal[0].dtype == torch.bfloat16:
        return with_rounding(step, products, lambda_, curvature)
    return step


def _by_halves(step: Step, first: Step, second: Step) -> Step:
    """Takes off what is left of the bias, and says how far what is left may be off.

    The noise that is taken off in (9) leaves a bias that falls with `1/k^2`: halves have four times as much, so a third
    of the difference between their mean and the whole is taken off as well, and may itself be wrong by as much. Where
    noise alone would have explained all of `v` in a half, halves say nothing, and the bias is at most about half the
    square of what was taken off (as far as the measurements of docs/compression.md go).
    """
    uneven = UNEVEN**2 * step.error.square()
    told = (first.noise_share < 1.0) & (second.noise_share < 1.0)
    shift = ((first.rest + second.rest) / 2.0 - step.rest) / 3.0
    shift = torch.where(told, shift, 0.0)
    bias = torch.where(told, shift, 0.5 * step.noise_share.square())
    expected = UNEVEN**2 * (first.error.square() + second.error.square())
    apart = (first.rest - second.rest).square() / expected.clamp(min=torch.finfo(torch.float64).tiny)
    return replace(
        step,
        rest=(step.rest - shift).clamp(min=0.0),
        error=(uneven + bias.square()).sqrt().clamp(max=1.0),
        apart=torch.where(told, apart, torch.nan),
        dots_error=UNEVEN * step.dots_error,
        mean_error=UNEVEN * step.mean_error,
    )
