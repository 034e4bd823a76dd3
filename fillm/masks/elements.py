"""A mask of single weights, chosen from scores that are read tensor by tensor and never held together.

The order of `fillm_kernels.top_mask`: by score, ties by tensor, then by flat index. A place in it is known by the key
of the score that stands there and by how many of its equals come before, which passes over the scores find by counting.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from fillm_kernels.top_mask import find_key, keys_of, mark
from torch import Tensor

from fillm.errors import NumericsError, UsageError
from fillm.masks.choice import Choice, budget
from fillm.masks.tensor_mask import TensorMask, pack

PIECE = 1 << 16  # weights taken at a time, few enough for the cache; a multiple of 8, so that pieces share no byte


class ElementScores(Protocol):
    """Where scores of single weights come from.

    Attributes:
        dtype: of all pieces.
        ascending: whether the smallest score stands first.
        unused: the score of weights that no gradient reaches; nothing stands behind them.
    """

    dtype: torch.dtype
    ascending: bool
    unused: float

    def pieces(self, name: str) -> Iterable[Tensor]:
        """The scores of one tensor in flat order, in pieces of `PIECE`, the last one shorter."""
        ...


@dataclass(frozen=True)
class ScoredTensor:
    """A tensor whose weights are to be chosen among."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its number of weights."""
        return torch.Size(self.shape).numel()


class _Place(NamedTuple):
    """Before it stand the weights with keys above `key`, and the first `ties` of those with the same."""

    key: int
    ties: int


_START = _Place((1 << 63) - 1, 0)  # no key is above


def element_masks(choice: Choice, tensors: Sequence[ScoredTensor], scores: ElementScores) -> dict[str, TensorMask]:
    """The weights that a choice takes; memory beside the bits does not grow with the model.

    Args:
        choice: of a part of all weights, or of those above a score.
        tensors: in the order of their names, in which ties are broken.
        scores: read three times for float32, once if nothing has to be counted.

    Raises:
        UsageError: if it takes none.
        NumericsError: for a score that is NaN.
    """
    kinds = dict.fromkeys(tensor.kind for tensor in tensors)
    groups = [[t for t in tensors if t.kind == kind] for kind in kinds] if choice.proportional else [list(tensors)]
    masks = {name: mask for group in groups for name, mask in _masks(choice, group, scores)}
    if not masks:
        raise UsageError(f"select {choice.text}: selects none of {sum(t.numel for t in tensors)} weights")
    return masks


def _masks(choice: Choice, tensors: list[ScoredTensor], scores: ElementScores) -> Iterator[tuple[str, TensorMask]]:
    """What lies between two places, tensor by tensor."""
    begin, end = _places(choice, tensors, scores)
    for tensor in tensors:
        bits, written = torch.empty(-(-tensor.numel // 8), dtype=torch.uint8), 0
        for piece in _read(tensor, scores):
            chosen, left = mark(piece, *end)
            end = end._replace(ties=left)
            if begin != _START:
                before, left = mark(piece, *begin)
                begin = begin._replace(ties=left)
                chosen &= ~before
            packed = pack(~chosen if choice.side == "bottom" else chosen)
            bits[written : written + len(packed)] = packed
            written += len(packed)
        if bool(bits.any()):
            yield tensor.name, TensorMask.from_bits(tensor.shape, bits)


def _places(choice: Choice, tensors: list[ScoredTensor], scores: ElementScores) -> tuple[_Place, _Place]:
    """Where the chosen part begins and ends; of `bottom`, the part that it leaves."""
    last = _above(scores.unused, scores)
    if choice.side == "above":
        return _START, max(last, _above(choice.above, scores))
    total = sum(tensor.numel for tensor in tensors)
    begin = budget(choice.begin, total)
    end = max(budget(choice.end, total), begin + 1)
    if choice.side == "bottom":
        return _START, _place(total - end, tensors, scores)
    # What is unused stands last: a place among it becomes that at which it begins.
    first, second = (_place(count, tensors, scores) for count in (begin, end))
    return tuple(place if place.key > last.key else last for place in (first, second))


def _above(score: float, scores: ElementScores) -> _Place:
    """The place before which all better scores stand."""
    wanted = -score if scores.ascending else score
    nearest = torch.tensor([wanted], dtype=scores.dtype)
    if float(nearest) > wanted:  # the number of this type that is nearest is itself better
        nearest = nearest.nextafter(torch.full_like(nearest, -torch.inf))
    return _Place(int(keys_of(nearest)[0]), 0)


def _place(count: int, tensors: list[ScoredTensor], scores: ElementScores) -> _Place:
    """The place before which `count` weights stand."""
    if count == 0:
        return _START
    return _Place(*find_key(lambda: (piece for t in tensors for piece in _read(t, scores)), count, scores.dtype))


def _read(tensor: ScoredTensor, scores: ElementScores) -> Iterator[Tensor]:
    for piece in scores.pieces(tensor.name):
        if bool(piece.isnan().any()):
            raise NumericsError(f"the score of a weight of {tensor.name} is NaN; a gradient of it is not finite")
        yield -piece if scores.ascending else piece
