"""`top_mask`: the mask of the `budget` largest of all scores together, one bit a weight.

    bit i of tensor t = 1  iff  (score, -t, -i) is among the `budget` largest    docs/method.md section 6

Radix selection on integer keys that have the order of the scores: each pass counts one digit of the keys whose higher
digits are known, from the most significant down, until the whole key of the budget-th largest score is known. Then the
bits are written. Nothing is sorted, joined or copied. Ties go to the lowest (tensor, flat index); -0 equals +0.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import FLOATS, as_integer, as_tensor
from fillm_kernels.dispatch import Backend, cuda_backend, register, select, triton_backend
from fillm_kernels.errors import DeviceError, DtypeError, NotANumberError, ShapeError

BLOCK_ENTRIES = 1 << 20  # scores that the torch backend takes at a time: 8 MiB of any 64-bit intermediate
DIGIT_BITS = 16
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TopMask(NamedTuple):
    """The mask of the largest scores.

    Attributes:
        bits: one uint8 tensor a score tensor, [ceil(P / 8)]; bit i % 8 of byte i // 8 (least significant first, as
            `numpy.packbits(bitorder="little")`) belongs to flat index i; the spare bits of the last byte are 0.
        threshold: the smallest score whose bit may be set, scalar, dtype of the scores; infinity for a budget of 0.
    """

    bits: list[Tensor]
    threshold: Tensor


def top_mask(scores: Sequence[Tensor | Any], budget: int) -> TopMask:
    """Mark the `budget` largest scores of all tensors together, exactly that many.

    Args:
        scores: tensors of any shapes (P entries each, empty ones allowed) on one device, all float32 | bfloat16 |
            float16 | float64. Infinities are scores like others; strided tensors are copied.
        budget: how many bits to set, from 0 to the number of scores.

    Returns:
        `bits` and `threshold`. Among equal scores the lowest (tensor, flat index) comes first.

    Raises:
        ShapeError: if `budget` is negative or more than there are scores, or `scores` is empty or no list.
        NotANumberError: if a score is NaN; names the tensor and the flat index.
        DtypeError: if dtypes differ or are not floating.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    if isinstance(scores, Tensor):  # whose rows would pass for tensors
        raise ShapeError("scores must be a list of tensors; put a single one into a list")
    tensors = [as_tensor(tensor, f"scores[{t}]") for t, tensor in enumerate(scores)]
    *bits, threshold = _op(tensors, as_integer(budget, "budget"))
    return TopMask(bits, threshold)


def _check(scores: Sequence[Tensor], budget: int) -> None:
    if not scores:
        raise ShapeError("scores must hold at least one tensor")
    for t, tensor in enumerate(scores):
        if tensor.dtype not in FLOATS or tensor.dtype != scores[0].dtype:
            raise DtypeError(f"scores must share one of {FLOATS}; scores[{t}] is {tensor.dtype}")
        if tensor.device != scores[0].device:
            raise DeviceError(f"scores must lie on one device; scores[{t}] is on {tensor.device}")
    total = sum(tensor.numel() for tensor in scores)
    if not 0 <= budget <= total:
        raise ShapeError(f"budget must lie between 0 and the number of scores, {total}; got {budget}")


def first_nan(scores: Sequence[Tensor], tensor: int) -> NotANumberError:
    """The error that names the first NaN of a tensor known to hold one."""
    flat = scores[tensor].flatten()
    for begin in range(0, flat.shape[0], BLOCK_ENTRIES):
        where = flat[begin : begin + BLOCK_ENTRIES].isnan().nonzero()
        if where.shape[0]:
            return NotANumberError(f"scores[{tensor}] is NaN at flat index {begin + int(where[0])}")
    raise AssertionError("a backend reported a NaN that is not there")


def pack_bits(chosen: Tensor) -> Tensor:
    """Bits of a boolean tensor, least significant first: any shape, P entries -> [ceil(P / 8)], uint8."""
    flat = chosen.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[0] % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, entries: int) -> Tensor:
    """The inverse of `pack_bits`: [ceil(P / 8)], uint8 -> [P], bool."""
    return ((bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).flatten()[:entries].bool()


def _reference(scores: Sequence[Tensor], budget: int) -> tuple[list[Tensor], Tensor]:
    """The definition by a stable sort; the oracle of the tests. P entries each -> [ceil(P / 8)] each, scalar."""
    for t, tensor in enumerate(scores):
        if bool(tensor.isnan().any()):
            raise first_nan(scores, t)
    joined = torch.cat([tensor.flatten().double() for tensor in scores])
    order = joined.sort(descending=True, stable=True).indices[:budget]
    chosen = torch.zeros_like(joined, dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([tensor.numel() for tensor in scores])
    threshold = joined[order[-1]] if budget else torch.tensor(torch.inf)
    return [pack_bits(part) for part in parts], threshold


def _cpu(scores: Sequence[Tensor], budget: int, instruction_set: str = "") -> tuple[list[Tensor], Tensor]:
    """C++ (csrc/cpu/top_mask.cpp); 16 bits of the key a pass. P entries each -> [ceil(P / 8)] each, scalar."""
    flat = [tensor.contiguous() for tensor in scores]
    bits = [torch.empty(-(-tensor.numel() // 8), dtype=torch.uint8) for tensor in flat]
    threshold = torch.full((), torch.inf, dtype=flat[0].dtype)
    nan = native.extension.top_mask(
        scores=[tensor.data_ptr() for tensor in flat],
        sizes=[tensor.numel() for tensor in flat],
        bits=[part.data_ptr() for part in bits],
        budget=budget,
        threshold=threshold.data_ptr(),
        dtype=native.DTYPE_CODES[str(threshold.dtype).removeprefix("torch.")],
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    if nan >= 0:
        raise first_nan(flat, nan)
    return bits, threshold


def keys_of(block: Tensor) -> Tensor:
    """Signed integers with the order of the scores, -0 as +0: [n] -> [n], int64, in the range of the scores' width."""
    width = 8 * block.element_size()
    stored = (block + 0.0).view(INTEGERS[block.element_size()]).to(torch.int64)  # -0 + 0 = +0, all else unchanged
    return stored ^ ((stored >> 63) & ((1 << (width - 1)) - 1))


def find_key(read: Callable[[], Iterable[Tensor]], budget: int, dtype: torch.dtype) -> tuple[int, int]:
    """The key of the budget-th largest score, and how many scores of that key the budget still takes.

    Args:
        read: gives all scores anew, in flat blocks without NaN, at each of its `8 itemsize / 16` calls; so they need
            not lie in memory at the same time.
        budget: from 1 to the number of scores.
        dtype: of the scores.
    """
    width, prefix, remaining = 8 * dtype.itemsize, 0, budget
    for shift in range(width - DIGIT_BITS, -1, -DIGIT_BITS):
        totals = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64)
        first = shift + DIGIT_BITS == width
        for block in read():
            keys = keys_of(block)
            if not first:
                keys = keys[keys >> (shift + DIGIT_BITS) == prefix]
            digits = (keys >> shift) + (1 << (DIGIT_BITS - 1)) if first else (keys >> shift) & 0xFFFF
            totals = totals.to(block.device)
            totals += torch.bincount(digits, minlength=1 << DIGIT_BITS)
        digit, remaining = descend(totals, remaining)
        prefix = digit - (1 << (DIGIT_BITS - 1)) if first else (prefix << DIGIT_BITS) | digit
    return prefix, remaining


def mark(block: Tensor, key: int, ties: int) -> tuple[Tensor, int]:
    """Keys above `key` and the first `ties` equal ones: [n] -> ([n], bool), and the ties that are left."""
    keys = keys_of(block)
    level = keys == key
    level &= level.cumsum(0) <= ties
    return (keys > key) | level, ties - int(level.sum())


def _torch(scores: Sequence[Tensor], budget: int) -> tuple[list[Tensor], Tensor]:
    """Torch's operators, block by block, on any device. P entries each -> [ceil(P / 8)] each, scalar."""
    flat = [tensor.contiguous().flatten() for tensor in scores]
    device = flat[0].device
    for t, tensor in enumerate(flat):
        if any(bool(block.isnan().any()) for block in tensor.split(BLOCK_ENTRIES)):
            raise first_nan(flat, t)
    if budget == 0:
        return [torch.zeros(-(-tensor.shape[0] // 8), dtype=torch.uint8, device=device) for tensor in flat], (
            torch.full((), torch.inf, device=device)
        )
    key, ties = find_key(
        lambda: (block for tensor in flat for block in tensor.split(BLOCK_ENTRIES)), budget, flat[0].dtype
    )
    return _write(flat, key, ties), value_of(key, flat[0])


def descend(totals: Tensor, remaining: int) -> tuple[int, int]:
    """The digit that holds the remaining-th largest key, and its rank inside: [digits], counts -> (digit, rank)."""
    above = totals.flip(0).cumsum(0)
    place = int((above < remaining).sum())
    return totals.shape[0] - 1 - place, remaining - (int(above[place - 1]) if place else 0)


def value_of(key: int, scores: Tensor) -> Tensor:
    """The score of a signed key, scalar, in the dtype of the scores."""
    width = 8 * scores.element_size()
    stored = key ^ ((key >> 63) & ((1 << (width - 1)) - 1))
    return torch.tensor(stored, dtype=INTEGERS[scores.element_size()]).view(scores.dtype).to(scores.device)


def _write(flat: Sequence[Tensor], key: int, ties: int) -> list[Tensor]:
    """Bits of keys above `key` and of the first `ties` equal ones: [P] each -> [ceil(P / 8)] each."""
    bits = []
    for tensor in flat:
        parts = [torch.empty(0, dtype=torch.uint8, device=tensor.device)]
        for block in tensor.split(BLOCK_ENTRIES):  # a multiple of 8, so that blocks share no byte
            chosen, ties = mark(block, key, ties)
            parts.append(pack_bits(chosen))
        bits.append(torch.cat(parts))
    return bits


@torch.library.custom_op("fillm_kernels::top_mask", mutates_args=())
def _op(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    _check(scores, budget)
    run = select("top_mask", scores[0].device, scores[0].dtype)
    bits, threshold = run([tensor.detach() for tensor in scores], budget)
    return [*bits, threshold.to(device=scores[0].device, dtype=scores[0].dtype)]


@_op.register_fake
def _(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    _check(scores, budget)
    bits = [tensor.new_empty((tensor.numel() + 7) // 8, dtype=torch.uint8) for tensor in scores]
    return [*bits, scores[0].new_empty(())]


register(
    "top_mask",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    cuda=cuda_backend("top_mask"),
    triton=triton_backend("top_mask", dtypes=()),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
