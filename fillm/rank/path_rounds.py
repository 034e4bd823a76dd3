"""Rounds of the path ranking: what is left out stays where it is, and the others are followed anew, (15) of method.md.

What a weight contributes depends on what moves beside it. A mask that holds a tenth of the weights still lets through
only what these contribute along a step of their own, longer than the one that all take together.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fillm.masks import PIECE, ScoredTensor, element_masks, make_choice
from fillm.models import TensorInfo


def kept_after(round_number: int, rounds: int, keep: float) -> float:
    """The fraction of the weights that are still moved after a round: equal ratios, so that the last leaves `keep`."""
    return float(keep ** (round_number / rounds))


class Rounds:
    """Leaves weights out of a step after every round but the last, and puts all of them in one order at the end.

    Memory: a score and a byte of every weight, where there is more than one round.

    Args:
        scope: the tensors.
        signs: of the step, int8; set to 0 where a weight is left out.
        count: of rounds.
        keep: the fraction of the weights that the last round's choice is for.
    """

    def __init__(self, scope: Sequence[TensorInfo], signs: Mapping[str, Tensor], count: int, keep: float) -> None:
        self._scope = [ScoredTensor(info.name, info.kind, info.shape) for info in scope]
        self._scope.sort(key=lambda tensor: tensor.name)
        self._signs, self.count, self._keep, self._done = signs, count, keep, 0
        several = count > 1
        self._left = {name: torch.zeros_like(sign) for name, sign in signs.items()} if several else {}
        self._scores: dict[str, Tensor] = {}

    def leave_out(self, scores: Mapping[str, Tensor]) -> int:
        """Ends a round: the worst of what moves is left out of the next one's step.

        Args:
            scores: of every weight in this round, minus infinity where it did not move.

        Returns:
            The number of weights that are still moved.
        """
        self._done += 1
        kept = 0
        choice = make_choice(kept_after(self._done, self.count, self._keep))
        masks = element_masks(choice, self._scope, _InMemory(scores))
        for name, sign in self._signs.items():
            if name not in self._scores:
                self._scores[name] = torch.zeros_like(scores[name])
            out = sign != 0
            if name in masks:
                out &= ~masks[name].to_bool().to(sign.device)
            self._left[name][out] = self._done
            self._scores[name] = torch.where(out, scores[name], self._scores[name])
            sign.masked_fill_(out, 0)
            kept += int(sign.count_nonzero())
        return kept

    def in_one_order(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The last round's scores, with those of the weights that were left out before below them, in place.

        What was left out in a round keeps its order, and its scores too where these are low enough; else they are all
        lowered by as much as puts the best of them below the worst of what went on.

        Args:
            scores: of the last round, minus infinity where a weight did not move.
        """
        lowest = min((_lowest(some) for some in scores.values()), default=torch.inf)
        for done in range(self._done, 0, -1):
            places = {name: left == done for name, left in self._left.items()}
            some = {name: self._scores[name][place] for name, place in places.items() if bool(place.any())}
            if not some:
                continue
            dtype = next(iter(some.values())).dtype
            highest = max(float(part.max()) for part in some.values())
            below = torch.tensor(lowest, dtype=dtype).nextafter(torch.tensor(-torch.inf, dtype=dtype))
            shift = min(0.0, float(below) - highest)
            for name, part in some.items():
                lowered = (part + shift).clamp_(max=float(below))  # what rounding lifts above
                scores[name][places[name]] = lowered
                lowest = min(lowest, float(lowered.min()))
        return scores


def _lowest(scores: Tensor) -> float:
    """Of those that are finite; infinity of none."""
    return float(scores.masked_fill(scores.isinf(), torch.inf).min()) if scores.numel() else torch.inf


class _InMemory:
    """Scores of single weights, minus infinity of those that do not move."""

    ascending, unused = False, -float("inf")

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._scores = scores
        wide = any(score.dtype == torch.float64 for score in scores.values())
        self.dtype = torch.float64 if wide else torch.float32

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As `ElementScores` says."""
        return (piece.to("cpu", self.dtype) for piece in self._scores[name].flatten().split(PIECE))
