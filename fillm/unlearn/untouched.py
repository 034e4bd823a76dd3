"""The proof that nothing outside a mask moved, and that what is inside did."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fillm.unlearn.compact import chosen_pieces, gather
from fillm.unlearn.matching import Masked, bare_name, masked_parameters, parameters_of

_PIECE = 1 << 24  # weights hashed at a time
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Verification:
    """What became of a model.

    Attributes:
        outside_mask_bit_equal: whether every weight outside the mask has the bits it had.
        differing: names of the tensors in which one has not.
        changed_parameters: selected weights whose bits changed.
        selected_parameters: weights of the mask.
        mask_applied: whether any of them changed.
    """

    outside_mask_bit_equal: bool
    differing: list[str]
    changed_parameters: int
    selected_parameters: int
    mask_applied: bool


class Untouched:
    """A model as it was, outside a mask by digests of 64 bits, inside by a copy of the selected weights.

    Make it with `Untouched.before(model, mask)` and ask `verify(model)` later. Weights are streamed: beside the copy
    of what is selected the memory does not grow with the model.
    """

    def __init__(self, mask: Mapping[str, Any], digests: dict[str, bytes], start: dict[str, Tensor]) -> None:
        self._mask, self._digests, self._start = mask, digests, start

    @classmethod
    def before(cls, model: nn.Module, mask: Mapping[str, Any]) -> "Untouched":
        """Take down how a model is.

        Args:
            model: any module whose parameters hold values.
            mask: a `fillm.Mask` of it.

        Raises:
            UsageError: a mask that does not fit the model.
        """
        masked = _by_parameter(model, mask)
        start = {item.name: gather(item.parameter, item.selection()).cpu() for item in masked.values()}
        return cls(mask, dict(_digests(model, masked)), start)

    def verify(self, model: nn.Module) -> Verification:
        """Compare a model with how it was.

        Args:
            model: the same one, or one of the same tensors. A tensor that has come, gone, or changed shape or dtype
                differs.
        """
        masked = _by_parameter(model, self._mask)
        now = dict(_digests(model, masked))
        names = dict.fromkeys([*self._digests, *now])
        differing = [name for name in names if self._digests.get(name) != now.get(name)]
        changed = sum(_changed(self._start[item.name], item) for item in masked.values())
        selected = sum(item.entry.count for item in masked.values())
        return Verification(not differing, differing, changed, selected, changed > 0)


def _by_parameter(model: nn.Module, mask: Mapping[str, Any]) -> dict[nn.Parameter, Masked]:
    return {item.parameter: item for item in masked_parameters(mask, parameters_of(model), "the model")}


def _digests(model: nn.Module, masked: Mapping[nn.Parameter, Masked]) -> Iterator[tuple[str, bytes]]:
    """Name, and digest of shape, dtype and the bytes of the weights that are not selected."""
    for name, parameter in model.named_parameters():
        digest = hashlib.blake2b(repr((tuple(parameter.shape), parameter.dtype)).encode(), digest_size=8)
        flat = parameter.detach().reshape(-1)
        item = masked.get(parameter)
        if item is None:
            pieces: Iterator[Tensor] = iter(flat.split(_PIECE))
        else:
            chosen = chosen_pieces(item.selection())
            pieces = (flat[begin : begin + inside.shape[0]][~inside] for begin, inside in chosen)
        for piece in pieces:
            digest.update(_bits(piece).cpu().contiguous().view(torch.uint8).numpy().data)
        yield bare_name(name), digest.digest()


def _changed(start: Tensor, item: Masked) -> int:
    now = gather(item.parameter, item.selection()).cpu()
    if now.dtype != start.dtype:
        return item.entry.count
    return int((_bits(now) != _bits(start)).sum())


def _bits(values: Tensor) -> Tensor:
    """The same bits as integers, for which NaN equals itself and -0 is not 0."""
    return values.view(_SAME_SIZE[values.element_size()])
