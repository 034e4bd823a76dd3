"""`top_mask` in Triton: histograms of digits in shared memory, then the bits; whole-number arithmetic throughout.

Digits have 11 bits (8 for 16-bit scores), since a table of 16-bit digits does not fit shared memory: 4 reads of
float32 scores, 3 of bfloat16 and float16, 7 of float64. Blocks that hold surplus ties are read once more. Programs keep
tables of their own, added up at the end, so there are no atomics.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.top_mask import INTEGERS, descend, first_nan, value_of
from fillm_kernels.triton.configurations import CompileCase, Configuration, launch_kernel, name_of

COUNT = Configuration({"BLOCK": 4096}, num_warps=8, num_stages=1)  # scores at a time; untimed; sm_90: 97 registers
WRITE = Configuration({"BLOCK": 4096}, num_warps=8, num_stages=1)  # untimed; sm_90: 74 registers
PROGRAMS = 1024  # a constant, so that extra memory is 16 MiB whatever the device
INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF << 52, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@triton.jit
def _key(bits, WIDTH: tl.constexpr):
    """Signed integers with the order of the scores; -0 becomes +0. Any shape, int32 | int64."""
    smallest: tl.constexpr = -(1 << (WIDTH - 1))
    magnitude: tl.constexpr = (1 << (WIDTH - 1)) - 1
    bits = tl.where(bits == smallest, 0, bits)
    return bits ^ ((bits >> (WIDTH - 1)) & magnitude)


@triton.jit
def _load(scores, at, size, WIDTH: tl.constexpr):
    bits = tl.load(scores + at, mask=at < size, other=0)
    return bits if WIDTH == 64 else bits.to(tl.int32)


# Digits and keys come from the scores: a kernel for those that are multiples of 16 would be compiled amid a run.
@triton.jit(do_not_specialize=["prefix"])
def _count(
    scores,  # [size], the scores' bits
    size,
    totals,  # [PROGRAMS, BINS], int64
    nan,  # [1], int32
    prefix,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    DIGIT: tl.constexpr,
    FIRST: tl.constexpr,
    INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bins: tl.constexpr = 1 << DIGIT
    magnitude: tl.constexpr = (1 << (WIDTH - 1)) - 1
    program = tl.program_id(0).to(tl.int64)
    table = tl.zeros([bins], dtype=tl.int32)  # a program would need 2^31 equal digits to overflow it: 8 TB of scores
    start = program * BLOCK
    while start < size:
        at = start + tl.arange(0, BLOCK)
        bits = _load(scores, at, size, WIDTH)
        inside = at < size
        key = _key(bits, WIDTH)
        if FIRST:
            # The topmost digit carries the sign: half the range is added. A table may have more bins than there are.
            digit = (key >> SHIFT) + (1 << (WIDTH - SHIFT - 1))
            tl.store(nan, 1, mask=tl.max(((bits & magnitude) > INF).to(tl.int32), 0) > 0)
        else:
            digit = (key >> SHIFT) & (bins - 1)
            inside = inside & ((key >> (SHIFT + DIGIT)) == prefix)
        table += tl.histogram(digit.to(tl.int32), bins, mask=inside)
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    own = totals + program * bins + tl.arange(0, bins)
    tl.store(own, tl.load(own) + table.to(tl.int64))


@triton.jit(do_not_specialize=["key", "quota"])
def _write(
    scores,  # [size], the scores' bits
    size,
    key,
    bits,  # [ceil(size / 8)], uint8
    ties,  # [blocks], int32: ties of each block, written, or read if TRIM
    before,  # [blocks], int64: ties before each block, read if TRIM
    quota,  # ties that keep their bits, over all tensors
    WIDTH: tl.constexpr,
    TRIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    earlier = block * 0
    if TRIM:
        count = tl.load(ties + block)
        earlier = tl.load(before + block)
        if count == 0 or earlier + count <= quota:
            return
    at = block * BLOCK + tl.arange(0, BLOCK)
    own = _key(_load(scores, at, size, WIDTH), WIDTH)
    level = (own == key) & (at < size)
    chosen = (own > key) & (at < size)
    if TRIM:
        chosen = chosen | (level & (earlier + tl.cumsum(level.to(tl.int32), 0) <= quota))
    else:
        chosen = chosen | level
        tl.store(ties + block, tl.sum(level.to(tl.int32), 0))
    place = tl.arange(0, 8)[None, :]
    packed = tl.sum(tl.reshape(chosen.to(tl.int32), [BLOCK // 8, 8]) << place, 1)
    byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte * 8 < size)


def digits_of(width: int) -> list[tuple[int, int]]:
    """(shift, bits) of every digit of a key, the most significant first; the first may be narrower than its table."""
    digit = 8 if width == 16 else 11
    return [(shift, digit) for shift in range((width - 1) // digit * digit, -1, -digit)]


def launch(scores: Sequence[Tensor], budget: int) -> tuple[list[Tensor], Tensor]:
    """P entries each -> [ceil(P / 8)] each, scalar; the arguments are checked."""
    dtype, device = scores[0].dtype, scores[0].device
    width = 8 * scores[0].element_size()
    flat = [tensor.contiguous().flatten().view(INTEGERS[scores[0].element_size()]) for tensor in scores]
    bits = [torch.zeros(-(-tensor.shape[0] // 8), dtype=torch.uint8, device=device) for tensor in flat]
    nan = torch.zeros(len(flat), dtype=torch.int32, device=device)
    key, remaining, ties = 0, budget, 0
    for shift, digit in digits_of(width):
        first = shift + digit >= width
        totals = torch.zeros(PROGRAMS, 1 << digit, dtype=torch.int64, device=device)
        constants = {"SHIFT": shift, "WIDTH": width, "DIGIT": digit, "FIRST": first, "INF": INFINITY[dtype]}
        for t, tensor in enumerate(flat):
            size = tensor.shape[0]
            programs = min(PROGRAMS, triton.cdiv(size, COUNT.constants["BLOCK"]))
            launch_kernel(_count, programs, COUNT, tensor, size, totals, nan[t:], key, **constants)
        if first and bool(nan.any()):
            raise first_nan(scores, int(nan.nonzero()[0]))
        if budget == 0:
            return bits, torch.full((), torch.inf, device=device)
        summed = totals.sum(0)
        place, remaining = descend(summed, remaining)
        ties = int(summed[place])
        key = place - (1 << (width - shift - 1)) if first else (key << digit) | place
    _mark(flat, bits, key, remaining, ties, width)
    return bits, value_of(key, scores[0])


def _mark(flat: Sequence[Tensor], bits: Sequence[Tensor], key: int, quota: int, ties: int, width: int) -> None:
    """Write the bits of keys from `key` up, then clear those of ties past the quota."""
    blocks = [triton.cdiv(tensor.shape[0], WRITE.constants["BLOCK"]) for tensor in flat]
    found = torch.zeros(sum(blocks), dtype=torch.int32, device=flat[0].device)
    before = found.new_zeros(1, dtype=torch.int64)
    for trim in (False, True)[: 1 + (ties > quota)]:
        if trim:
            before = found.cumsum(0) - found
        first = 0
        for tensor, part, count in zip(flat, bits, blocks, strict=True):
            tables = (found[first:], before[first if trim else 0 :])
            arguments = (tensor, tensor.shape[0], key, part, *tables, quota)
            launch_kernel(_write, count, WRITE, *arguments, WIDTH=width, TRIM=trim)
            first += count


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], int]:
    """Several tensors, more than one block, a negative threshold and surplus ties, for the check at first use."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator, dtype=torch.float64).to(dtype)
    sizes = (77, 9000, 0, 1234)
    return [values[torch.randint(64, (size,), generator=generator)].to(device) for size in sizes], 7500


def compile_cases() -> Iterator[CompileCase]:
    """The first and the last digit of every width, and both ways of writing; most sizes are no multiples of 16."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):  # float16 has the bits of bfloat16, and an infinity
        width = 8 * dtype.itemsize
        key = "i64" if width == 64 else "i32"
        scores = {"scores": f"*i{width}", "size": "i32"}
        for shift, digit in (digits_of(width)[0], digits_of(width)[-1]):
            types = {**scores, "totals": "*i64", "nan": "*i32", "prefix": key}
            first = shift + digit >= width
            constants = {"SHIFT": shift, "WIDTH": width, "DIGIT": digit, "FIRST": first, "INF": INFINITY[dtype]}
            name = f"top_mask digit at {shift} {name_of(dtype)}"
            yield CompileCase(name, _count, COUNT, types, constants, aligned=False)
        for trim in (False, True):
            types = {**scores, "key": key, "bits": "*u8", "ties": "*i32", "before": "*i64", "quota": "i32"}
            name = f"top_mask {'trim' if trim else 'write'} {name_of(dtype)}"
            yield CompileCase(name, _write, WRITE, types, {"WIDTH": width, "TRIM": trim}, aligned=False)
