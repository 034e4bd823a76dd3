"""`sketch` on Triton: every program owns a run of bins in registers and loads what falls on them.

A block of coordinates is a rotation of a run of bins, so the value for bin j of block b lies at a known address: loads
of consecutive entries, additions in registers, no atomics, no shared memory. The sign word of a bin serves 32 blocks.
Splits of the coordinates depend on their number alone and are added in order. Sizes of the tiles: untimed.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.arguments import accumulation_dtype
from fillm_kernels.seed_law import KINDS, SIGNS, BlockMap
from fillm_kernels.triton.configurations import DTYPES, POINTERS, CompileCase, Configuration, launch_kernel, name_of
from fillm_kernels.triton.seed_law import SIGN, START, below, cell, halves, key_of, normal, state_of

# Compiled for sm_90 with 4 warps: 56 to 96 registers for 1024 x 2, 256 x 8 and 64 x 32 bins x blocks, 72 and 78 for the
# dense kinds (235 and more with tiles twice as large either way), no stack, no spill.
BINS, ENTRIES = 1024, 2048  # bins of a program at most, and entries it loads at a time
SPLITS = 64  # parts of one vector at most
DENSE = Configuration({"SAMPLES": 16, "COORDINATES": 16, "BINS": 32}, num_warps=4, num_stages=3)
SUM = Configuration({"BINS": BINS}, num_warps=4, num_stages=3)


def shipped(width: int) -> Configuration:
    """The configuration of the sparse kinds for runs of `width` bins."""
    bins = min(BINS, triton.next_power_of_2(width))
    return Configuration({"BINS": bins, "BLOCKS": max(1, min(SIGNS, ENTRIES // bins))}, num_warps=4, num_stages=3)


def launch(g: Tensor, dim: int, kind: str, seed: int, nonzeros: int, offset: int | Tensor) -> Tensor:
    """The backend: g [B, P] -> [B, dim], float32 (float64 for float64)."""
    if kind in ("rademacher", "gaussian"):
        return _dense(g, dim, kind, seed, offset)
    law = BlockMap.of(kind, seed, dim, nonzeros)
    samples, count = g.shape
    group = SIGNS * law.width
    first = offset // group
    groups = (offset + count + group - 1) // group - first
    splits = max(1, min(SPLITS, groups))
    configuration = shipped(law.width)
    tiles = law.chunks * law.ranges * triton.cdiv(law.width, configuration.constants["BINS"])
    dtype = accumulation_dtype(g.dtype)
    partial = torch.empty(samples, splits, dim, dtype=dtype, device=g.device)
    launch_kernel(
        _block_kernel, samples * splits * tiles, configuration, g, partial, g.stride(0), g.stride(1), count, offset,
        *halves(seed), first, triton.cdiv(groups, splits), splits, tiles, dim, law.width, law.ranges,
        KIND=KINDS.index(kind), WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return _sum_splits(partial, law.scale)


def _sum_splits(partial: Tensor, scale: float) -> Tensor:
    """[samples, splits, dim] -> [samples, dim], in order; a library's sum may take another one for another shape."""
    samples, splits, dim = partial.shape
    out = torch.empty(samples, dim, dtype=partial.dtype, device=partial.device)
    launch_kernel(_split_kernel, samples * triton.cdiv(dim, BINS), SUM, partial, out, splits, dim, scale)
    return out


@triton.jit(do_not_specialize=["splits"])
def _split_kernel(partial, out, splits, dim, scale, BINS: tl.constexpr):
    tiles = (dim + BINS - 1) // BINS
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BINS + tl.arange(0, BINS)
    total = tl.zeros((BINS,), dtype=out.dtype.element_ty)
    for split in range(0, splits):
        total += tl.load(partial + (sample * splits + split) * dim + column, mask=column < dim, other=0.0)
    tl.store(out + sample * dim + column, total * scale, mask=column < dim)


@triton.jit(do_not_specialize=["offset", "seed_low", "seed_high", "first", "splits", "tiles", "width", "ranges"])
def _block_kernel(
    values, partial, stride, step, count, offset, seed_low, seed_high, first, share, splits, tiles, dim, width, ranges,
    KIND: tl.constexpr, BINS: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    split = (program // tiles) % splits
    sample = (program // tiles // splits).to(tl.int64)
    runs = (width + BINS - 1) // BINS
    chunk = tile // (runs * ranges)
    home = (tile // runs) % ranges
    column = (tile % runs) * BINS + tl.arange(0, BINS)  # bin of the run
    column_bin = (home * width + column).to(tl.uint32)  # bin of the chunk
    start_first, start_second = key_of(seed_low, seed_high, KIND, START, chunk)
    sign_first, sign_second = key_of(seed_low, seed_high, KIND, SIGN, chunk)
    sums = tl.zeros((BLOCKS, BINS), dtype=WIDE)
    begin = first.to(tl.int64) + split.to(tl.int64) * share
    for turn in range(0, share):
        group = begin + turn
        word_first, word_second = state_of(sign_first, sign_second, group)
        words = cell(word_first, word_second, column_bin)
        for within in range(0, 32, BLOCKS):
            bit = within + tl.arange(0, BLOCKS)
            block = group * 32 + bit
            block_first, block_second = state_of(start_first, start_second, block)
            start = below(cell(block_first, block_second, tl.zeros_like(block_first)), width * ranges)
            rotation = start % width
            position = column[None, :] - rotation[:, None]
            position = tl.where(position < 0, position + width, position)
            at = (block * width - offset)[:, None] + position
            mine = (column < width)[None, :] & (start // width == home)[:, None] & (at >= 0) & (at < count)
            entry = tl.load(values + sample * stride + at * step, mask=mine, other=0.0).to(WIDE)
            flip = (words[None, :] >> bit.to(tl.uint32)[:, None]) & 1
            sums += tl.where(flip != 0, -entry, entry)
    target = partial + (sample * splits + split) * dim + chunk * (width * ranges) + column_bin
    tl.store(target, tl.sum(sums, 0), mask=column < width)


def _dense(g: Tensor, dim: int, kind: str, seed: int, offset: int | Tensor) -> Tensor:
    """Rademacher and Gaussian: g [B, P] times entries made in registers.

    float64, which the product of a tile does not take, by torch's operators.
    """
    if g.dtype == torch.float64:
        from fillm_kernels.sketch import project

        return project(g, dim, kind, seed, offset)
    samples, count = g.shape
    own = isinstance(offset, Tensor)
    table = _groups(offset) if own else torch.zeros(0, 3, dtype=torch.int64, device=g.device)
    groups = table.shape[0] if own else triton.cdiv(samples, DENSE.constants["SAMPLES"])
    steps = triton.cdiv(count, DENSE.constants["COORDINATES"])
    splits = max(1, min(SPLITS, steps))
    tiles = triton.cdiv(dim, DENSE.constants["BINS"])
    partial = torch.empty(samples, splits, dim, dtype=torch.float32, device=g.device)
    launch_kernel(
        _dense_kernel, groups * splits * tiles, DENSE, g, partial, table, g.stride(0), g.stride(1), samples, count,
        0 if own else offset, *halves(seed), triton.cdiv(steps, splits), splits, tiles, dim,
        KIND=KINDS.index(kind), NORMAL=kind == "gaussian", OWN=own,
    )  # fmt: skip
    return _sum_splits(partial, dim**-0.5)


def _groups(offsets: Tensor) -> Tensor:
    """First row, row after the last and offset of every SAMPLES rows of one offset: [B] -> [groups, 3], int64."""
    from fillm_kernels.sketch import runs_of

    size, runs = DENSE.constants["SAMPLES"], runs_of(offsets, offsets.shape[0])
    groups = [(row, min(row + size, end), first) for top, end, first in runs for row in range(top, end, size)]
    return torch.tensor(groups, dtype=torch.int64).view(-1, 3).to(offsets.device)


@triton.jit(do_not_specialize=["offset", "seed_low", "seed_high", "splits", "tiles"])
def _dense_kernel(
    values, partial, groups, stride, step, samples, count, offset, seed_low, seed_high, share, splits, tiles, dim,
    KIND: tl.constexpr, NORMAL: tl.constexpr, OWN: tl.constexpr,
    SAMPLES: tl.constexpr, COORDINATES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = (program // tiles) % splits
    group = (program // tiles // splits).to(tl.int64)
    sample = group * SAMPLES + tl.arange(0, SAMPLES)
    present = sample < samples
    if OWN:
        sample = tl.load(groups + group * 3) + tl.arange(0, SAMPLES)
        present = sample < tl.load(groups + group * 3 + 1)
        offset = tl.load(groups + group * 3 + 2)
    column = (program % tiles) * BINS + tl.arange(0, BINS)
    sums = tl.zeros((SAMPLES, BINS), dtype=tl.float32)
    for turn in range(0, share):
        at = (split.to(tl.int64) * share + turn) * COORDINATES + tl.arange(0, COORDINATES)
        inside = present[:, None] & (at < count)[None, :]
        entry = tl.load(values + sample[:, None] * stride + at[None, :] * step, mask=inside, other=0.0).to(tl.float32)
        coordinate = at + offset
        if NORMAL:
            matrix = normal(coordinate, column, seed_low, seed_high, KIND)
        else:
            first, second = key_of(seed_low, seed_high, KIND, SIGN, 0)
            first, second = state_of(first, second, coordinate >> 5)
            word = cell(first[:, None], second[:, None], column.to(tl.uint32)[None, :])
            flip = (word >> (coordinate & 31).to(tl.uint32)[:, None]) & 1
            matrix = tl.where(flip != 0, -1.0, 1.0)
        sums += tl.dot(entry, matrix, input_precision="ieee")
    target = partial + (sample[:, None] * splits + split) * dim + column[None, :]
    tl.store(target, sums, mask=present[:, None] & (column < dim)[None, :])


def small_case(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, int, str, int, int, int | Tensor]]:
    """Several chunks, blocks cut at both ends and more than one group of them; the dense kinds; for the first use."""
    g = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    own = torch.tensor([9, 9, 2**33], device=device)
    dense = [(g[:, :70], 40, kind, 5, 4, offset) for kind in ("rademacher", "gaussian") for offset in (7, own)]
    return [(g, 60, "sjlt", 5, 4, 7), *dense]


def compile_cases() -> Iterator[CompileCase]:
    """Sparse kinds with runs of many and few bins, dense kinds, and the sum of the parts."""
    # Numbers that are a multiple of 16 only by chance; the row length, alone, gets the hint.
    counts = {name: "i32" for name in ("step", "count", "seed_low", "seed_high", "share", "splits", "tiles", "dim")}
    for dtype in (*DTYPES, torch.float64):
        for kind, width in (("oporp", 4096), ("oporp", 61), ("countsketch", 1024), ("countsketch", 64), ("sjlt", 1024),
                            ("sjlt", 1)):  # fmt: skip
            wide = accumulation_dtype(dtype)
            types = {"values": POINTERS[dtype], "partial": POINTERS[wide], "stride": "i32", **counts}
            types |= {"offset": "i64", "first": "i64", "width": "i32", "ranges": "i32"}
            constants = {"KIND": KINDS.index(kind), "WIDE": tl.float64 if wide == torch.float64 else tl.float32}
            yield CompileCase(f"sketch {kind} of {width} bins {name_of(dtype)}", _block_kernel, shipped(width), types,
                              constants, counts=(*counts, "offset", "first", "width", "ranges"))  # fmt: skip
    for dtype in DTYPES:
        for kind, own in (("rademacher", False), ("gaussian", False), ("rademacher", True), ("gaussian", True)):
            types = {"values": POINTERS[dtype], "partial": "*fp32", "groups": "*i64", "stride": "i32", "samples": "i32"}
            types |= {**counts, "offset": "i64"}
            constants = {"KIND": KINDS.index(kind), "NORMAL": kind == "gaussian", "OWN": own}
            name = f"sketch {kind} {'of rows at places ' if own else ''}{name_of(dtype)}"
            yield CompileCase(name, _dense_kernel, DENSE, types, constants, counts=(*counts, "samples", "offset"))
    for dtype in (torch.float32, torch.float64):
        types = {"partial": POINTERS[dtype], "out": POINTERS[dtype], "splits": "i32", "dim": "i32", "scale": "fp32"}
        yield CompileCase(f"sketch sum of parts {name_of(dtype)}", _split_kernel, SUM, types, counts=("splits", "dim"))
