"""From sketches of gradients to inner products, and from noisy answers of many tensors to estimates with error bars.

A sketch is stretched to its gradient's exact length, so that it speaks of the angle alone. One tensor's answer may be
noisier than the correction it tells of; the corrections of a model's tensors are of one size, though, and what is known
of them together says how far to trust each (docs/method.md, "Compression").
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fillm.capture import SketchMap
from fillm.statistics.gram import RowsGram
from fillm.statistics.gram_form import MOST_PAIRED, InnerProducts

BAR = 1.9  # standard errors: holds 94 % of a normal variable
LEAST_POOLED = 4  # tensors, below which there is nothing to learn from the others
PRIOR_PAIRS = 16  # of samples, whose measured noise counts as much as what bins of one side would have
LEAST_SPREAD = 0.9  # of the mean correction: the least by which tensors are taken to differ


def sketched_products(
    to: SketchMap, rows: Tensor, q: Tensor, targets: Tensor, squares: Tensor, numel: int
) -> InnerProducts:
    """What sketches say of one tensor.

    Args:
        to: the map that made them.
        rows: sketches of retain gradients, [n, k], float32 | bfloat16 | float64; may be a file's memory.
        q: exact `|g_i|^2`, [n], float64.
        targets: sketches of the right-hand sides, [m, k].
        squares: exact `|v_j|^2`, [m], float64.
        numel: `P_l`.
    """
    targets = targets.double()
    if to.kind == "exact":
        gram = RowsGram(rows, torch.ones_like(q))
        nothing = torch.zeros_like(squares)
        return InnerProducts(numel, q, gram.times(targets.T), squares, gram, nothing, (rows, targets.T))
    gram, right = _stretched(rows, q), _stretched(targets, squares)
    noise = torch.full_like(squares, _noise(to, gram, q, numel))
    found = InnerProducts(numel, q, _between(gram, right), squares, gram, noise, targets=right)
    if not to.kind.startswith("factored"):
        return found
    halves = []
    for part in (slice(None, to.dim // 2), slice(to.dim // 2, None)):
        gram, right = _stretched(rows[:, part], q), _stretched(targets[:, part], squares)
        halves.append(replace(found, cross=_between(gram, right), gram=gram, noise=2.0 * noise, targets=right))
    return replace(found, halves=tuple(halves))


def _stretched(rows: Tensor, exact: Tensor) -> RowsGram:
    """Sketches that are as long as their gradients, whose squared lengths are `exact`."""
    found = RowsGram(rows, exact).lengths()
    scale = torch.where(found > 0, (exact / found.clamp(min=torch.finfo(torch.float64).tiny)).sqrt(), 0.0)
    return RowsGram(rows, scale)


def _between(gram: RowsGram, right: RowsGram) -> Tensor:
    """Inner products of the rows of both, [n, m]."""
    return gram.times((right.rows * right.scale[:, None]).T)


def measured_noise(gram: RowsGram, q: Tensor) -> float | None:
    """Variance of an inner product in units of both squared lengths, from how far two halves of the numbers differ.

    Each half of the numbers of a sketch says about half of every inner product, with a noise of its own, so the
    difference has the variance of the sum. Over all pairs of up to `MOST_PAIRED` samples; None where there is no pair.
    """
    some = (q > 0).nonzero()[:, 0]
    if some.numel() < 2 or gram.rows.shape[1] < 2:
        return None
    some = some[torch.linspace(0, some.numel() - 1, min(some.numel(), MOST_PAIRED)).round().long().unique()]
    unit = gram.rows[some].double() * (gram.scale[some] / q[some].sqrt())[:, None]
    half = unit.shape[1] // 2
    apart = unit[:, :half] @ unit[:, :half].T - unit[:, half:] @ unit[:, half:].T
    pairs = apart.square().sum() - apart.diagonal().square().sum()
    return float(pairs) / (some.numel() * (some.numel() - 1))


def _noise(to: SketchMap, gram: RowsGram, q: Tensor, numel: int) -> float:
    """The measured variance; few pairs may look quiet by chance, and leave it near that of even bins."""
    measured, even = measured_noise(gram, q), _one_sided_noise(to, numel)
    if measured is None:
        return even
    samples = int((q > 0).sum())
    pairs = samples * (samples - 1) / 2
    weighed = (pairs * measured + PRIOR_PAIRS * even) / (pairs + PRIOR_PAIRS)
    # Bins of one side bound the variance; projected factors only add to it.
    return min(weighed, even) if to.halves == 1 else max(weighed, measured)


def _one_sided_noise(to: SketchMap, numel: int) -> float:
    """`nu = 1/k`; of bins of one length, which coordinates share without replacement, `(P - k) / ((P - 1) k)`.

    The latter is in Li and Li, OPORP, arXiv 2302.03505.
    """
    return (numel - to.dim) / (numel - 1) / to.dim if to.kind == "oporp" else 1.0 / to.dim


@dataclass(frozen=True)
class Estimate:
    """Numbers known to some error, one per tensor and right-hand side; float64."""

    value: Tensor
    error: Tensor  # one standard error

    def bounds(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """`value` minus and plus `BAR` errors, within [low, high]."""
        return (self.value - BAR * self.error).clamp(low, high), (self.value + BAR * self.error).clamp(low, high)


def widened(error: Tensor, apart: Tensor) -> Tensor:
    """Errors of `rest`, larger by as much as two halves of the sketches are further apart than they say.

    One tensor's halves say little of that, those of all tensors together enough.

    Args:
        error: one standard error, [L, m].
        apart: as in `Step`, [L, m].
    """
    measured = ~apart.isnan()
    mean = torch.where(measured, apart, 0.0).sum(0) / measured.sum(0).clamp(min=1)
    return torch.where(measured, error * mean.clamp(min=1.0).sqrt(), error)


def explained(value: Tensor, error: Tensor) -> Estimate:
    """`1 - rest` of every tensor, each weighed against what all tensors say.

    Of tensors whose inner products are exact nothing changes. The others are taken as draws around a common mean with a
    common spread (their plain moments), and the estimate is the posterior mean, never below 0.

    Args:
        value: `1 - rest` as every tensor's own inner products have it, [L, m].
        error: one standard error, [L, m].
    """
    noisy = error > 0
    mean, unsure, spread = _pooled(value, error, noisy)
    variance = error.square()
    total = (spread + variance).clamp(min=torch.finfo(torch.float64).tiny)
    best = torch.where(noisy, (value * spread + mean * variance) / total, value).clamp(max=1.0)
    left = spread * variance / total + unsure * (variance / total).square()
    return Estimate(torch.where(noisy, best.clamp(min=0.0), best), torch.where(noisy, left.sqrt(), 0.0))


def _pooled(value: Tensor, error: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the corrections across tensors, its variance, and theirs, [1, m]; with few tensors, of each by itself."""
    noisy = noisy & (error < 1.0)  # others say nothing
    count = noisy.sum(0)
    if int(count.min()) < LEAST_POOLED:
        nothing = torch.zeros_like(value[:1])
        return nothing, nothing, torch.maximum(value.square() - error.square(), 0.25 * error.square())
    # Every tensor counts the same: errors are estimated from the same noise as the values, and come out small where
    # those do, so that weights by the errors would make the mean too small.
    mean = torch.where(noisy, value, 0.0).sum(0) / count
    scatter = torch.where(noisy, (value - mean).square(), 0.0).sum(0) / (count - 1)
    noise = torch.where(noisy, error.square(), 0.0).sum(0) / count
    spread = (scatter - noise).clamp(min=0.0)
    unsure = (spread + noise) / count
    mean = _not_negative(mean, unsure.sqrt())
    return mean[None], unsure[None], torch.maximum(spread, (LEAST_SPREAD * mean).square())[None]


def _not_negative(mean: Tensor, error: Tensor) -> Tensor:
    """What a number is on average that was found to be `mean` with a normal error, and cannot be below 0."""
    at = (mean / error).clamp(min=-30.0)
    density = torch.exp(-0.5 * at.square()) / math.sqrt(2.0 * math.pi)
    return error * (at + density / torch.special.ndtr(at).clamp(min=torch.finfo(torch.float64).tiny))


def top_set_confidence(value: Tensor, error: Tensor, count: int, draws: int = 2000) -> float:
    """How likely the `count` largest of some scores are the right ones, were they known without error.

    Args:
        value: scores, [L]; infinite ones stay where they are.
        error: standard errors, [L], 0 where a score is exact.
        count: size of the set.
        draws: of all scores, from independent normal distributions, with a fixed seed.

    Returns:
        The part of the draws that agree with `value`, in [0, 1].
    """
    if not bool(error.any()) or count >= value.numel():
        return 1.0
    generator = torch.Generator().manual_seed(0)
    scores = value + error * torch.randn(draws, value.numel(), generator=generator, dtype=torch.float64)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
    chosen = value.argsort(descending=True, stable=True)[:count].sort().values
    return float((best == chosen).all(1).double().mean())
