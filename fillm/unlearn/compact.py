"""Selected weights as one vector, in the order of their flat indices: out of a tensor, back into it, and the rest."""

from collections.abc import Iterator

import torch
from fillm_kernels import Selection
from fillm_kernels.selection import chosen_indices
from fillm_kernels.top_mask import unpack_bits
from torch import Tensor

_AT_A_TIME = 1 << 20  # weights; a multiple of 8, so that pieces of the bits are whole bytes


def gather(tensor: Tensor, selection: Selection) -> Tensor:
    """The selected entries of a tensor.

    Args:
        tensor: any shape, P entries, any strides.
        selection: of P weights, on the same device.

    Returns:
        [count], a copy, dtype of `tensor`.
    """
    flat, compact = tensor.detach().reshape(-1), torch.empty(selection.count, dtype=tensor.dtype, device=tensor.device)
    for place, at in chosen_indices(selection.places()):
        compact[place : place + at.shape[0]] = flat[at]
    return compact


def scatter_(tensor: Tensor, selection: Selection, compact: Tensor) -> None:
    """Write [count] values to the selected entries, rounded to the dtype of `tensor` (contiguous); leave the others."""
    flat = tensor.detach().view(-1)
    for place, at in chosen_indices(selection.places()):
        flat[at] = compact[place : place + at.shape[0]].to(flat.dtype)


def chosen_pieces(selection: Selection) -> Iterator[tuple[int, Tensor]]:
    """The whole tensor piece by piece: (flat index of the first entry, bool [n] whether each is selected)."""
    if selection.bits is not None:
        for begin in range(0, selection.entries, _AT_A_TIME):
            count = min(_AT_A_TIME, selection.entries - begin)
            yield begin, unpack_bits(selection.bits[begin // 8 : (begin + count + 7) // 8], count)
    elif selection.rows is not None and selection.entries:
        columns = selection.columns
        chosen = torch.zeros(selection.entries // columns, dtype=torch.bool, device=selection.rows.device)
        chosen[selection.rows] = True
        rows = max(1, _AT_A_TIME // columns)
        for first in range(0, chosen.shape[0], rows):
            yield first * columns, chosen[first : first + rows].repeat_interleave(columns)


def zero_outside_(tensor: Tensor, selection: Selection) -> None:
    """Set every entry that is not selected to 0, NaN included.

    Args:
        tensor: any shape, contiguous or not; changed.
        selection: of as many weights.
    """
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().reshape(-1)
    for begin, chosen in chosen_pieces(selection):
        flat[begin : begin + chosen.shape[0]].masked_fill_(~chosen, 0)
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))
