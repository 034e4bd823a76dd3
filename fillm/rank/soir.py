"""Second-Order Influence Ranking: one pass over the forget set, one over the retain set (docs/method.md)."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fillm.capture import Capture
from fillm.data import SampleSet
from fillm.errors import NumericsError
from fillm.rank.passes import Passes
from fillm.statistics import (
    BRACKET_SLACK,
    MeanGradient,
    MeanPower,
    RetainMoments,
    Scalars,
    SquaredNorms,
    WeightedSum,
    accumulator_dtype,
    squared_norm,
    uncertified,
)

NOISE = 1e-9  # of the largest tensor's gradient; float32 rounds at 6e-8


@dataclass
class Influence:
    """What the passes say of every tensor.

    Attributes:
        low, high: bounds of `|u|`; equal where `u` was computed.
        update: `u`, where it was computed; then `forget_mean` is `v`.
        revisited: [n] bool, the retain samples that the follow-up pass visited for a tensor; absent if none.
        sizes: the larger of `|v|^2` and `mean_i(q_i)`, by which rounding noise is told.
        noise: tensors whose gradients are rounding noise; all else says that nothing reaches them.
    """

    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    lambda_: dict[str, float] = field(default_factory=dict)
    mean_retain_sq_norm: dict[str, float] = field(default_factory=dict)
    forget_norm: dict[str, float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    update: dict[str, Tensor] = field(default_factory=dict)
    forget_mean: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    revisited: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    noise: set[str] = field(default_factory=set)

    @property
    def visited_again(self) -> int:
        """Number of retain samples that the follow-up pass visited."""
        return count_visited(self.revisited)


def mean_gradient(
    passes: Passes, stage: str, label: str, capture: Capture, samples: SampleSet, power: int | None = None
) -> dict[str, Tensor]:
    """The mean per-sample gradient of a set, or of its entries' absolute values (`power` 1) or squares (2).

    Raises:
        NumericsError: naming the sample and tensor that spoil it.
    """
    given = capture.parameters, len(samples)
    offload = capture.offload
    statistic = MeanGradient(*given, offload) if power is None else MeanPower(*given, power, offload)
    passes.run(stage, label, capture, samples, statistic)
    refuse_overflow(passes, stage, label, capture, samples, statistic.mean)
    return statistic.mean


def refuse_overflow(
    passes: Passes, stage: str, label: str, capture: Capture, samples: SampleSet, sums: Mapping[str, Tensor]
) -> None:
    """Names what made a sum of a pass's gradients other than finite.

    Raises:
        NumericsError: naming the sample and tensor that spoil it.
    """
    spoilt = [name for name, total in sums.items() if not math.isfinite(squared_norm(total))]
    if spoilt:
        # Which sample it was is worth a second look at the data: the search stops at the first.
        passes.run(
            f"{stage}-search",
            f"search of the {label}",
            capture,
            samples,
            SquaredNorms(capture.parameters, len(samples)),
        )
        raise NumericsError(f"the mean gradient of {spoilt[0]} overflows although every sample's is finite")


def rank_soir(
    passes: Passes,
    capture: Capture,
    forget: SampleSet,
    retain: SampleSet,
    *,
    damping: float,
    tolerance: float,
    need_update: bool,
    largest: float = 0.0,
) -> Influence:
    """Scores every tensor in scope by `|u|`, equation (3); with `need_update`, computes `u` itself.

    `largest` is the largest of the `sizes` of tensors that are ranked with these, in another group of layers.
    """
    v = mean_gradient(passes, "forget", "forget pass", capture, forget)
    moments = RetainMoments(v, len(retain), damping, weighted=v, tolerance=None if need_update else tolerance)
    passes.run("retain", "retain pass", capture, retain, moments)
    scalars = {name: moments.scalars(name) for name in v}
    sizes = {name: max(s.forget_sq_norm, float(s.q.mean())) for name, s in scalars.items()}
    noise = rounding_noise(sizes, largest)
    for name in noise:
        v[name].zero_()
        scalars[name] = _of_nothing(scalars[name])
        moments.sums.pop(name, None)
    out = _from_scalars(scalars)
    out.sizes, out.noise = sizes, noise
    wanted = set(v) if need_update else _uncertified(out, moments, tolerance)
    wanted = {name for name in wanted if scalars[name].lambda_ > 0}
    sums: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name in sorted(wanted):
        if name in moments.sums:
            sums[name], delta = moments.weighted_sum(name)
            delta = moments.to_revisit(name, delta)
            del moments.sums[name]
        else:
            delta = scalars[name].coefficients()
        if name not in sums or bool(delta.any()):
            weights[name] = delta
    moments.sums.clear()
    if weights:
        restricted = capture.like(sorted(weights))
        follow = WeightedSum({name: v[name] for name in weights}, weights, len(retain))
        passes.run("follow-up", "follow-up pass", restricted, retain, follow, positions=follow.samples())
        out.revisited = {name: delta != 0 for name, delta in weights.items()}
        for name, total in follow.total.items():
            sums[name] = sums[name].add_(total) if name in sums else total
    for name, w in sums.items():
        u = w.sub_(v[name]).div_(scalars[name].lambda_)  # -(v - w) / lambda
        size = math.sqrt(squared_norm(u))
        slack = BRACKET_SLACK * math.sqrt(scalars[name].forget_sq_norm) / scalars[name].lambda_
        if slack <= tolerance * size:
            out.low[name] = out.high[name] = size
        else:  # v and w all but cancel: the forget and the retain set pull the same way
            out.low[name], out.high[name] = max(0.0, size - slack), size + slack
            out.notes[name] = "forget and retain gradients parallel: known to rounding only"
        if need_update:
            out.update[name] = u
    if need_update:
        out.forget_mean = v
        for name in set(v) - set(sums):
            out.update[name] = torch.zeros_like(v[name])
    return out


def rounding_noise(sizes: Mapping[str, float], largest: float = 0.0) -> set[str]:
    """Tensors whose gradients of both sets are far below one rounding of the largest tensor's.

    A query that can attend to one token alone has no gradient; what backpropagation leaves there is noise, and divided
    by its own square it would rank first.

    Args:
        sizes: of every tensor, as in `Influence`.
        largest: the largest of others.
    """
    floor = NOISE**2 * max([largest, *sizes.values()])
    return {name for name, value in sizes.items() if 0.0 < value < floor}


def count_visited(revisited: Mapping[str, Tensor]) -> int:
    """Number of samples that a follow-up pass visited for any tensor; `revisited` as in `Influence`."""
    return int(torch.stack([*revisited.values()]).any(0).sum()) if revisited else 0


def influence_of_nothing(parameters: Mapping[str, Tensor], count: int, damping: float) -> Influence:
    """What is said of tensors that no gradient of either set reaches; `count` is `n`."""
    nothing = torch.zeros(count, dtype=torch.float64)
    out = _from_scalars({name: Scalars(p.numel(), 0.0, nothing, nothing, damping) for name, p in parameters.items()})
    for made in (out.forget_mean, out.update):
        made |= {name: torch.zeros_like(p, dtype=accumulator_dtype(p.dtype)) for name, p in parameters.items()}
    return out


def _of_nothing(scalars: Scalars) -> Scalars:
    nothing = torch.zeros_like(scalars.q)
    return dataclasses.replace(scalars, forget_sq_norm=0.0, q=nothing, d=nothing)


def _uncertified(out: Influence, moments: RetainMoments, tolerance: float) -> set[str]:
    """Tensors that neither the scalars nor the partial sums certify; narrows the brackets of the others."""
    failed = uncertified({name: (out.low[name], out.high[name]) for name in out.low}, tolerance)
    for name in sorted(failed & set(moments.sums)):  # in one order in all processes, which add up for each
        low, high = moments.partial_bracket(name)
        out.low[name], out.high[name] = max(low, out.low[name]), min(high, out.high[name])
    return uncertified({name: (out.low[name], out.high[name]) for name in out.low}, tolerance)


def _from_scalars(scalars: dict[str, Scalars]) -> Influence:
    out = Influence()
    for name, s in scalars.items():
        out.low[name], out.high[name] = s.bracket()
        out.lambda_[name] = s.lambda_
        out.mean_retain_sq_norm[name] = float(s.q.mean())
        out.forget_norm[name] = math.sqrt(s.forget_sq_norm)
        out.gain[name] = s.gain if s.forget_sq_norm > 0 else 0.0
        if s.lambda_ == 0.0:
            out.notes[name] = "unused" if s.forget_sq_norm == 0.0 else "no retain gradient"
    return out
