"""What every weight contributes to the rise of both losses along the optimiser's first step, followed until it tells.

A model that recites its rows has next to no gradient on the retain set, so slopes at the start say little about what a
long step will cost. Adam's first step is the sign of the forget gradient `v` (Kingma and Ba, arXiv 1412.6980). All
weights are moved along it, `theta(t) = theta + t s` with `s = sign(v)`, until the forget loss has risen by so much, at
`t = T`. With `G` and `R` the mean gradients of forget and retain set, weight `p` has contributed

    gain[p] = s[p] integral_0^T G(theta(t))[p] dt        damage[p] = s[p] integral_0^T R(theta(t))[p] dt

Summed over weights these are the rises of the two losses (Sundararajan et al., arXiv 1703.01365, for the integral
along a line). The integrals are taken by the midpoint rule.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.experiment.case import Case
from benchmarks.experiment.probe import find_length, mean_gradient, mean_loss
from fillm.data import Row, tokenize_rows


@dataclass(frozen=True)
class Contributions:
    """Of every weight, by tensor, nats a token.

    Attributes:
        gain: to the rise of the forget loss.
        damage: to the rise of the retain loss.
        length: `T`, a change of every weight.
    """

    gain: Mapping[str, Tensor]
    damage: Mapping[str, Tensor]
    length: float


def contributions(
    case: Case, retain: Sequence[Row], names: Sequence[str], rise: float, points: int
) -> Contributions | None:
    """Of the weights of some tensors, all of which are moved; None if the forget loss never rises by so much.

    Args:
        case: the model, which comes back as it was, and its forget rows.
        retain: the rows whose loss is the damage.
        names: of tensors.
        rise: of the forget loss, nats a token.
        points: of the midpoint rule.
    """
    forget, kept = (
        tokenize_rows(list(rows), case.tokenizer, source=name)
        for name, rows in (("forget", case.rows["forget"]), ("retain", retain))
    )
    signs = {name: gradient.sign() for name, gradient in mean_gradient(case.model, forget, names).items()}
    start = mean_loss(case.model, forget)

    def risen(length: float) -> float:
        with moved(case.model, signs, length):
            return mean_loss(case.model, forget) - start

    length = find_length(risen, rise)
    if length is None:
        return None
    gain, damage = ({name: torch.zeros_like(sign) for name, sign in signs.items()} for _ in range(2))
    for point in range(points):
        with moved(case.model, signs, length * (point + 0.5) / points):
            for total, samples in ((gain, forget), (damage, kept)):
                for name, gradient in mean_gradient(case.model, samples, names).items():
                    total[name].addcmul_(gradient, signs[name], value=length / points)
    return Contributions(gain, damage, length)


@contextmanager
def moved(model: nn.Module, direction: Mapping[str, Tensor], length: float) -> Iterator[None]:
    """With some tensors moved along a direction; they come back bit by bit."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in direction}
    try:
        with torch.no_grad():
            for name, value in direction.items():
                parameters[name].add_(value, alpha=length)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def worth(found: Contributions, weight: float) -> dict[str, Tensor]:
    """`gain - weight * damage` of every weight: what it forgets less what it costs, in nats a token."""
    return {name: gain - weight * found.damage[name] for name, gain in found.gain.items()}


def best_weights(scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """The so-many weights of the highest scores, ties by tensor and then by place, as bool tensors."""
    flat = torch.cat([scores[name].flatten() for name in scores])
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: max(1, int(fraction * flat.numel()))]] = True
    parts = chosen.split([scores[name].numel() for name in scores])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


def by_row(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight given the mean score of its row of the matrix."""
    return {name: score.mean(-1, keepdim=True).expand_as(score).contiguous() for name, score in scores.items()}
