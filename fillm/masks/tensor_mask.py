"""The selected weights of one tensor: all of them, some of its rows, or single ones as one bit each."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from fillm_kernels import Selection, select_bits, select_rows
from torch import Tensor

from fillm.errors import UsageError

_PIECE_BYTES = 1 << 20  # of bits taken at a time, 8 Mi weights


@dataclass(frozen=True, eq=False)
class TensorMask:
    """Which weights of one tensor are selected; the whole tensor if neither rows nor bits are given.

    The functions that make one choose the form: whole before rows before bits. Two masks of the same weights are equal
    whatever their form.

    Attributes:
        shape: of the tensor.
        rows: numbers of the selected slices of the first dimension, [R], int64, ascending; or None.
        bits: [ceil(numel / 8)], uint8, least significant bit first, spare bits 0, as `fillm_kernels.top_mask` gives
            them; or None.

    Raises:
        UsageError: if rows or bits are not those of a tensor of this shape.
    """

    shape: tuple[int, ...]
    rows: Tensor | None = None
    bits: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.bits is not None:
            raise UsageError("a mask has rows or bits, not both")
        if (bits := self.bits) is not None:
            size, spare = -(-self.numel // 8), self.numel % 8
            if bits.dtype != torch.uint8 or tuple(bits.shape) != (size,):
                raise UsageError(f"its bits must be [{size}] of uint8, not {list(bits.shape)} of {bits.dtype}")
            if spare and int(bits[-1]) >> spare:
                raise UsageError(f"its bits past weight {self.numel} are not 0")
        if (rows := self.rows) is not None:
            count = self.shape[0] if self.shape else 0
            if rows.dtype != torch.int64 or rows.ndim != 1:
                raise UsageError(f"its rows must be [R] of int64, not {list(rows.shape)} of {rows.dtype}")
            if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= count or bool((rows.diff() <= 0).any())):
                raise UsageError(f"its rows must ascend without repeats from 0 to {count - 1} at most")

    @classmethod
    def from_rows(cls, shape: tuple[int, ...], chosen: Tensor) -> "TensorMask":
        """The slices of the first dimension that are chosen: [shape[0]], bool."""
        return cls(shape) if bool(chosen.all()) else cls(shape, rows=chosen.nonzero().flatten())

    @classmethod
    def from_bits(cls, shape: tuple[int, ...], bits: Tensor) -> "TensorMask":
        """The weights whose bit is set, in the form that fits them; the bits are not copied.

        Rows of a vector would be longer than its bits: a vector is whole or has bits.
        """
        mask = cls(shape, bits=bits)
        if len(shape) < 2 or mask.numel == 0:
            return cls(shape) if torch.equal(bits, cls(shape).packed()) else mask
        rows = _whole_rows(bits, shape)
        return mask if rows is None else cls.from_rows(shape, rows)

    @classmethod
    def from_bool(cls, chosen: Tensor) -> "TensorMask":
        """The weights at which a bool tensor of the tensor's shape is True."""
        return cls.from_bits(tuple(chosen.shape), pack(chosen))

    @property
    def numel(self) -> int:
        """Weights of the tensor."""
        return math.prod(self.shape)

    @property
    def form(self) -> str:
        """`whole`, `rows` or `bits`."""
        return "bits" if self.bits is not None else "whole" if self.rows is None else "rows"

    @cached_property
    def count(self) -> int:
        """Selected weights."""
        if self.bits is not None:
            return select_bits(self.bits, self.numel).count
        return self.numel if self.rows is None else len(self.rows) * math.prod(self.shape[1:])

    def __bool__(self) -> bool:
        """Whether anything is selected."""
        return bool(self.bits.any()) if self.bits is not None else self.count > 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorMask):
            return NotImplemented
        if self.shape != other.shape:
            return False
        if self.form == other.form == "rows":
            return torch.equal(self.rows, other.rows)
        return self.form == other.form == "whole" or torch.equal(self.packed(), other.packed())

    def selection(self, device: torch.device | str = "cpu") -> Selection:
        """The same as the kernels take it; a whole tensor as all of its rows."""
        if self.bits is not None or not self.shape:
            return select_bits(self.packed().to(device), self.numel)
        rows = torch.arange(self.shape[0]) if self.rows is None else self.rows
        return select_rows(rows.to(device), self.shape)

    def row_flags(self) -> Tensor:
        """Which slices of the first dimension are selected, [shape[0]], bool; of rows and whole tensors."""
        chosen = torch.full(self.shape[:1], self.rows is None)
        return chosen if self.rows is None else chosen.index_fill_(0, self.rows, True)

    def packed(self) -> Tensor:
        """One bit a weight, [ceil(numel / 8)], uint8, whatever the form; not to be written to."""
        if self.bits is not None:
            return self.bits
        if self.rows is not None:
            return pack(self.row_flags().repeat_interleave(math.prod(self.shape[1:])))
        return _trimmed(torch.full((-(-self.numel // 8),), 255, dtype=torch.uint8), self.numel)

    def unpacked(self) -> Iterator[np.ndarray]:
        """One byte a weight, 0 or 1, in flat order and in pieces, uint8."""
        left = self.numel
        for piece in self.packed().split(_PIECE_BYTES):
            yield np.unpackbits(piece.numpy(), count=min(left, 8 * len(piece)), bitorder="little")
            left -= 8 * len(piece)

    def to_bool(self) -> Tensor:
        """True where a weight is selected, [*shape], bool."""
        out = torch.empty(self.numel, dtype=torch.bool)
        begin = 0
        for piece in self.unpacked():
            out[begin : begin + len(piece)] = torch.from_numpy(piece.view(np.bool_))
            begin += len(piece)
        return out.view(self.shape)

    def combined(self, other: "TensorMask", operation: Callable[[Tensor, Tensor], Tensor]) -> "TensorMask":
        """`torch.bitwise_or` or `torch.bitwise_and` of two masks of the same shape."""
        if self.bits is None and other.bits is None and len(self.shape) > 1:
            return self.from_rows(self.shape, operation(self.row_flags(), other.row_flags()))
        return self.from_bits(self.shape, operation(self.packed(), other.packed()))

    def complement(self) -> "TensorMask":
        """Every weight that is not selected."""
        if self.bits is None and len(self.shape) > 1:
            return self.from_rows(self.shape, ~self.row_flags())
        return self.from_bits(self.shape, _trimmed(~self.packed(), self.numel))


def pack(chosen: Tensor) -> Tensor:
    """Bits of a bool tensor, least significant first: P entries -> [ceil(P / 8)], uint8."""
    pieces = chosen.contiguous().view(torch.uint8).flatten().split(8 * _PIECE_BYTES)
    # As bytes: a file may hold other true values than 1.
    packed = [np.packbits(piece.numpy(), bitorder="little") for piece in pieces]
    return torch.from_numpy(packed[0] if len(packed) == 1 else np.concatenate(packed))


def _trimmed(bits: Tensor, entries: int) -> Tensor:
    """Sets the spare bits of the last byte to 0, in place."""
    if entries % 8:
        bits[-1] &= (1 << entries % 8) - 1
    return bits


def _whole_rows(bits: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The rows that are selected, [shape[0]], bool, if each is selected as a whole or not at all; else None."""
    columns = math.prod(shape[1:])
    at_a_time = 8 * max(1, _PIECE_BYTES // columns)  # rows that end where a byte ends
    chosen = []
    for first in range(0, shape[0], at_a_time):
        count = min(at_a_time, shape[0] - first)
        piece = bits[first * columns // 8 : -(-(first + count) * columns // 8)].numpy()
        flags = np.unpackbits(piece, count=count * columns, bitorder="little").reshape(count, columns)
        whole = flags.all(1)
        if not np.array_equal(whole, flags.any(1)):
            return None
        chosen.append(torch.from_numpy(whole))
    return torch.cat(chosen)
