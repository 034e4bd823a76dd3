"""What every op accepts, and the checks made once at the boundary."""

import math
import operator
import warnings
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fillm_kernels.errors import DeviceError, DtypeError, ShapeError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_tensor(value: Any, name: str, *, written: bool = False) -> Tensor:
    """A tensor over the caller's memory, without copying.

    Args:
        value: a tensor, a numpy array, or anything with `__dlpack__` (JAX, CuPy).
        name: the argument's name, for the message.
        written: whether the op writes to it, so that neither a copy nor read-only memory will do.

    Returns:
        A tensor that shares memory with `value` (a copy only for numpy arrays with negative strides).

    Raises:
        DtypeError: if `value` is none of these, holds elements torch has no type for, is sparse or nested, or cannot be
            written to; if a numpy array is masked or has a foreign byte order.
        DeviceError: if it lies where this torch cannot reach it.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            raise DtypeError(f"{name} is sparse or nested; pass an ordinary tensor")
        return value
    if isinstance(value, np.ndarray):
        return _from_numpy(value, name, written)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value, name, written)
    raise DtypeError(f"{name} is a {type(value).__name__}; pass a tensor, a numpy array or an object with __dlpack__")


def _from_numpy(value: np.ndarray, name: str, written: bool) -> Tensor:
    backwards = any(stride < 0 for stride in value.strides)
    if written and (not value.flags.writeable or backwards):
        raise DtypeError(f"{name} is read-only or has negative strides; pass an array that can be written to")
    if isinstance(value, np.ma.MaskedArray):
        raise DtypeError(f"{name} is a masked array, whose mask no op knows; pass its data")
    if not value.dtype.isnative:
        raise DtypeError(f"{name} is in the byte order of another machine; pass a copy in this one's")
    try:
        with warnings.catch_warnings():
            # torch warns that a read-only array could be written to through the tensor; inputs are never written.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(np.ascontiguousarray(value) if backwards else value)
    except (TypeError, ValueError) as error:  # numpy's own: strides between elements
        raise DtypeError(f"{name}: {error}") from error


class _Writable:
    """An array asked for by the first DLPack, which cannot say "read-only": its owner refuses instead.

    torch takes no notice of the flag by which later ones say it, and would write there.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **options: Any) -> Any:
        return self._value.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._value.__dlpack_device__()


def _from_dlpack(value: Any, name: str, written: bool) -> Tensor:
    try:
        return torch.from_dlpack(_Writable(value) if written else value)
    except (AssertionError, BufferError, RuntimeError, TypeError) as error:  # of its owner, or a torch without CUDA
        on_cpu = int(value.__dlpack_device__()[0]) == 1
        raise (DtypeError if on_cpu else DeviceError)(f"{name}: {error}") from error


def as_integer(value: Any, name: str) -> int:
    """A whole number, numpy's too, as the registered ops take it.

    Raises:
        DtypeError: if it is none.
        ShapeError: if it does not fit 64 bits.
    """
    if not isinstance(value, (int, torch.SymInt)):  # a symbol, under torch.compile, stays one
        try:
            value = operator.index(value)
        except TypeError as error:
            raise DtypeError(f"{name} must be a whole number; got {value!r}") from error
    if not -(1 << 63) <= value < 1 << 63:
        raise ShapeError(f"{name} must fit 64 bits; got {value}")
    return value


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_ragged(x: Tensor, dy: Tensor, offsets: Tensor) -> None:
    """Check shapes, element types and devices of the ragged convention; reads no values.

    Args:
        x: [N, I], float32 | float64 | bfloat16 | float16.
        dy: [N, O], same dtype and device.
        offsets: [B + 1], int64, on the same device or on the CPU.

    Raises:
        ShapeError, DtypeError, DeviceError: with the sizes, types or devices that clash.
    """
    if x.ndim != 2 or dy.ndim != 2 or x.shape[0] != dy.shape[0]:
        raise ShapeError(f"x and dy must be [N, I] and [N, O]; got {list(x.shape)} and {list(dy.shape)}")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ShapeError(f"offsets must be [B + 1] with at least one entry; got {list(offsets.shape)}")
    if offsets.dtype != torch.int64:
        raise DtypeError(f"offsets must be int64; got {offsets.dtype}")
    if x.dtype not in FLOATS or dy.dtype != x.dtype:
        raise DtypeError(
            f"x and dy must share one of float32, float64, bfloat16, float16; got {x.dtype} and {dy.dtype}"
        )
    if dy.device != x.device or (offsets.device != x.device and offsets.device.type != "cpu"):
        raise DeviceError(f"x, dy and offsets must lie on one device; got {x.device}, {dy.device} and {offsets.device}")


def check_offsets(offsets: Tensor, rows: int) -> Tensor:
    """Check that offsets run from 0 to `rows` without stepping back.

    Args:
        offsets: [B + 1], int64, any device.
        rows: N, the number of packed rows.

    Returns:
        The same offsets, contiguous, on the CPU.

    Raises:
        ShapeError: naming the first entry that is wrong.
    """
    host = offsets.to("cpu").contiguous()
    first, last = int(host[0]), int(host[-1])
    if first != 0 or last != rows:
        raise ShapeError(f"offsets must run from 0 to N = {rows}; they run from {first} to {last}")
    steps = host[1:] < host[:-1]
    if bool(steps.any()):
        where = int(steps.nonzero()[0]) + 1
        before, after = int(host[where - 1]), int(host[where])
        raise ShapeError(f"offsets must not decrease; offsets[{where}] = {after} comes after {before}")
    return host


class _Span:
    """Where the entries of a tensor lie, as numpy asks for it; nothing is read."""

    def __init__(self, tensor: Tensor) -> None:
        strides = tuple(step * tensor.element_size() for step in tensor.stride())
        kind = f"|V{tensor.element_size()}"
        where = {"data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape), "strides": strides}
        self.__array_interface__ = {**where, "typestr": kind, "version": 3}


def _shared(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an address in common."""
    return bool(np.shares_memory(np.asarray(_Span(one)), np.asarray(_Span(other))))


def _overlaps_itself(matrix: Tensor) -> bool:
    """Whether two entries of a matrix lie at one address: i entries down are j entries across somewhere inside."""
    (down, across), (far, near) = matrix.shape, matrix.stride()
    if down <= 1 or across <= 1 or far == 0 or near == 0:
        return (down > 1 and far == 0 and across > 0) or (across > 1 and near == 0 and down > 0)
    meeting = math.lcm(far, near)
    return meeting // far < down and meeting // near < across


def check_memory(written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """Check that what is written shares no memory, neither within itself nor with anything else; reads no values.

    Args:
        written: arguments an op writes to, by name; None for one that is not given.
        read: arguments it only reads, likewise.

    Raises:
        ShapeError: naming the arguments.
    """
    given = [(n, t, n in written) for n, t in (*written.items(), *read.items()) if t is not None and t.numel()]
    for name, tensor, changes in given:
        if changes and tensor.ndim == 2 and _overlaps_itself(tensor):
            raise ShapeError(f"entries of {name} share memory; pass a tensor with memory of its own")
    by_storage: dict[tuple[torch.device, int], list[tuple[str, Tensor, bool]]] = {}
    for each in given:  # mostly one a storage, so that nothing is left to compare
        by_storage.setdefault((each[1].device, each[1].untyped_storage().data_ptr()), []).append(each)
    for group in by_storage.values():
        for (name, tensor, changes), (other_name, other, _) in combinations(group, 2):
            if changes and _shared(tensor, other):
                raise ShapeError(f"{name} and {other_name} share memory; pass two tensors")


def sample_of_row(offsets: Tensor, device: torch.device) -> Tensor:
    """The sample each packed row belongs to: offsets [B + 1] on the CPU -> [N], int64, on `device`."""
    return torch.repeat_interleave(torch.arange(offsets.shape[0] - 1), offsets.diff()).to(device)
