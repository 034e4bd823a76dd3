"""Which weights of a tensor a masked op is about, and where the state of each lies.

Single weights come as bits, one a weight, in the order of `top_mask`; whole rows come as a list of their numbers. State
is held for selected weights only, without gaps, in the order of their flat indices. For bits, a prefix count a block of
2048 weights says where the state of a block begins; inside a block the bits are counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fillm_kernels.arguments import accumulation_dtype, as_tensor
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.top_mask import unpack_bits

BLOCK = 2048  # weights a prefix count stands for; as kMaskBlock in csrc/cpu/masked_step.h
BLOCKS_AT_A_TIME = 512  # of the torch backend: about a million weights


class Places(NamedTuple):
    """A selection as the backends take it: plain tensors and numbers.

    Attributes:
        bits, starts, rows: as in `Selection`.
        sizes: [entries, columns, count] of the selection.
    """

    bits: Tensor | None
    starts: Tensor
    rows: Tensor | None
    sizes: Sequence[int]

    @property
    def mask(self) -> Tensor | None:
        """The bits, or the rows."""
        return self.bits if self.rows is None else self.rows


@dataclass(frozen=True)
class Selection:
    """The selected weights of one tensor; make it once with `select_bits` or `select_rows` and use it at every step.

    Attributes:
        count: how many weights are selected.
        state_shape: shape of a state tensor, [count], or [R, columns] for rows.
        entries: weights of the tensor, P.
        bits: [ceil(P / 8)], uint8, or None for rows.
        starts: selected weights before each block of 2048, and `count` at the end, int64; empty for rows.
        rows: [R], int64, ascending, or None for bits.
        columns: weights of a row, 0 for bits.
    """

    count: int
    state_shape: tuple[int, ...]
    entries: int
    bits: Tensor | None
    starts: Tensor
    rows: Tensor | None
    columns: int

    def places(self) -> Places:
        """The same as plain tensors and numbers."""
        return Places(self.bits, self.starts, self.rows, [self.entries, self.columns, self.count])

    def new_state(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Two state tensors of zeros: `state_shape` each, float32 (float64 for float64 parameters)."""
        dtype = accumulation_dtype(param.dtype)
        first, second = (torch.zeros(self.state_shape, dtype=dtype, device=param.device) for _ in range(2))
        return first, second


def select_bits(bits: Tensor | Any, entries: int) -> Selection:
    """Selection of the weights whose bit is set.

    Args:
        bits: [ceil(P / 8)], uint8, as `top_mask` gives them.
        entries: P, the number of weights; spare bits of the last byte must be 0.

    Raises:
        ShapeError, DtypeError: if `bits` is not such a mask.
    """
    bits = as_tensor(bits, "bits").contiguous()
    if bits.dtype != torch.uint8:
        raise DtypeError(f"bits must be uint8; got {bits.dtype}")
    if entries < 0 or bits.shape != ((entries + 7) // 8,):
        raise ShapeError(f"bits of {entries} weights must be [{(entries + 7) // 8}]; got {list(bits.shape)}")
    if entries % 8 and int(bits[-1]) >> entries % 8:
        raise ShapeError(f"bits past weight {entries} must be 0; the last byte is {int(bits[-1])}")
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=bits.device)
    counts = [torch.zeros(1, dtype=torch.int64, device=bits.device)]
    for part in bits.split(1 << 20):  # the look-up takes 4 bytes a byte
        padded = torch.nn.functional.pad(part, (0, -part.shape[0] % (BLOCK // 8)))
        counts.append(ones[padded.int()].view(-1, BLOCK // 8).sum(1, dtype=torch.int64))
    starts = torch.cat(counts).cumsum(0)
    count = int(starts[-1])
    return Selection(count, (count,), entries, bits, starts, None, 0)


def select_rows(rows: Tensor | Any, shape: Sequence[int]) -> Selection:
    """Selection of whole rows, slices of the first dimension.

    Args:
        rows: [R], int64, ascending without repeats.
        shape: shape of the parameter, [rows, ...].

    Raises:
        ShapeError, DtypeError: if `rows` is not such a list.
    """
    rows = as_tensor(rows, "rows").contiguous()
    if rows.dtype != torch.int64:
        raise DtypeError(f"rows must be int64; got {rows.dtype}")
    if rows.ndim != 1 or not shape:
        raise ShapeError(f"rows must be [R] of a parameter with rows; got {list(rows.shape)} of {list(shape)}")
    if rows.shape[0] and (bool((rows.diff() <= 0).any()) or int(rows[0]) < 0 or int(rows[-1]) >= shape[0]):
        raise ShapeError(f"rows must ascend without repeats from 0 to {shape[0] - 1} at most")
    columns = 1
    for size in shape[1:]:
        columns *= size
    starts = torch.empty(0, dtype=torch.int64, device=rows.device)
    return Selection(rows.shape[0] * columns, (rows.shape[0], columns), shape[0] * columns, None, starts, rows, columns)


def as_selection(mask: Selection | Tensor | Any, param: Tensor) -> Selection:
    """A mask as the ops take it: a selection, bits (uint8), or rows (int64) of `param`."""
    if isinstance(mask, Selection):
        return mask
    mask = as_tensor(mask, "mask")
    if mask.device != param.device:
        raise DeviceError(f"the mask must lie where its tensor does, {param.device}; got {mask.device}")
    return select_bits(mask, param.numel()) if mask.dtype == torch.uint8 else select_rows(mask, param.shape)


def packed(selections: Sequence[Selection]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Selections of several tensors as the registered ops take them.

    Returns:
        The masks, whose element type says whether they are bits (uint8) or rows (int64); `starts` of each; and `sizes`
        of each, three numbers a selection.
    """
    places = [selection.places() for selection in selections]
    masks = [place.mask for place in places if place.mask is not None]
    return masks, [place.starts for place in places], [size for place in places for size in place.sizes]


def unpacked(masks: Sequence[Tensor], starts: Sequence[Tensor], sizes: Sequence[int]) -> list[Places]:
    """The way back from `packed`."""
    places = []
    for t, (mask, start) in enumerate(zip(masks, starts, strict=True)):
        bits, rows = (mask, None) if mask.dtype == torch.uint8 else (None, mask)
        places.append(Places(bits, start, rows, sizes[3 * t : 3 * t + 3]))
    return places


def check_selection(values: Tensor, places: Places) -> None:
    """Check that a selection belongs to a tensor of these sizes; reads no values."""
    _, starts, rows, sizes = places
    mask = places.mask
    if mask is None or mask.device != values.device or starts.device != values.device:
        raise DeviceError(f"the mask must lie where its tensor does, {values.device}")
    entries, columns, _ = sizes
    if values.numel() != entries or (rows is not None and (values.ndim == 0 or values.shape[0] * columns != entries)):
        raise ShapeError(f"the mask is one of {entries} weights, {columns or 'any number'} a row; got {values.shape}")


def chosen_indices(places: Places) -> Iterator[tuple[int, Tensor]]:
    """Selected weights piece by piece: (place of the first in the state, ascending flat indices [n], int64)."""
    bits, starts, rows, (entries, columns, _) = places
    if rows is not None:
        at_a_time = max(1, BLOCKS_AT_A_TIME * BLOCK // max(1, columns))
        for first in range(0, rows.shape[0], at_a_time):
            part = rows[first : first + at_a_time, None] * columns
            yield first * columns, (part + torch.arange(columns, device=rows.device)).flatten()
    elif bits is not None:
        step = BLOCKS_AT_A_TIME * BLOCK
        for begin in range(0, entries, step):
            part = unpack_bits(bits[begin // 8 : (begin + step) // 8 + 1], min(step, entries - begin))
            yield int(starts[begin // BLOCK]), part.nonzero().flatten() + begin


def extension_numbers(places: Places) -> tuple[int, int, int, int, int, int]:
    """A selection as the extension takes it (csrc/bindings/masked_step.cpp)."""
    bits, starts, rows, (entries, columns, _) = places
    if rows is None:
        return (0 if bits is None else bits.data_ptr()), starts.data_ptr(), entries, 0, 0, 0
    return 0, 0, entries, rows.data_ptr(), rows.shape[0], columns
