"""Count sketches of rows and sums of products of spectra, for the TensorSketch of `factored_sketch`.

Every coordinate has a bin of a hash of its own, so bins differ in how many coordinates they get. The coordinates are
sorted by bin once a call, and a program gathers what falls on its bins, one turn after another in the order of the
coordinates: nothing is scattered. A row is a few kilobytes, and its entries are read once each.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.seed_law import KINDS
from fillm_kernels.triton.configurations import DTYPES, POINTERS, CompileCase, Configuration, launch_kernel, name_of
from fillm_kernels.triton.seed_law import SIGN, START, below, cell, halves, key_of, state_of

# untimed; chosen by `python -m fillm_kernels.compile_check`: 26, at most 64 and at most 70 registers, no spill.
CODES = Configuration({"BLOCK": 256}, num_warps=4, num_stages=1)
GATHER = tuple(Configuration({"ROWS": 1024 // bins, "BINS": bins}, num_warps=4, num_stages=1) for bins in (256, 64, 16))
SPECTRA = Configuration({"BLOCK_T": 16, "BLOCK_W": 64}, num_warps=4, num_stages=1)
TENSORSKETCH = KINDS.index("tensorsketch")
BIN = tl.constexpr(33)  # where the bin starts in a code; below it 32 bits of coordinate and one of sign


@triton.jit(do_not_specialize=["seed_low", "seed_high", "count", "dim", "side"])
def codes_kernel(codes, seed_low, seed_high, count, dim, side, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Bin, coordinate and sign bit of every coordinate in one int64, which sorts by bin, then by coordinate."""
    coordinate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, second = key_of(seed_low, seed_high, KIND, START, side)
    first, second = state_of(first, second, coordinate)
    bins = below(cell(first, second, tl.zeros_like(first)), dim)
    first, second = key_of(seed_low, seed_high, KIND, SIGN, side)
    first, second = state_of(first, second, coordinate >> 5)
    word = cell(first, second, tl.zeros_like(first))
    bit = (word >> (coordinate & 31).to(tl.uint32)) & 1
    code = (bins.to(tl.int64) << BIN) | (coordinate << 1) | bit.to(tl.int64)
    tl.store(codes + coordinate, code, mask=coordinate < count)


def table(width: int, dim: int, seed: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What falls on every bin of one side, dy (0) or x (1).

    Returns:
        Codes of all coordinates by bin, [width], and the first of every bin and `width`, [dim + 1]; int64.
    """
    codes = torch.empty(width, dtype=torch.int64, device=device)
    launch_kernel(
        codes_kernel, triton.cdiv(width, CODES.constants["BLOCK"]), CODES, codes, *halves(seed), width, dim, side,
        KIND=TENSORSKETCH,
    )  # fmt: skip
    codes = codes.sort().values
    return codes, torch.searchsorted(codes, torch.arange(dim + 1, device=device) << BIN.value)


def shipped(dim: int) -> Configuration:
    """The configuration of the gather for `dim` bins: few bins get many coordinates each, and a program more rows."""
    return next(one for one in GATHER if dim > one.constants["BINS"] // 4 or one is GATHER[-1])


@triton.jit(do_not_specialize=["rows", "dim"])
def gather_kernel(values, codes, starts, sums, stride, rows, dim, ROWS: tl.constexpr, BINS: tl.constexpr):
    """Some bins of some rows."""
    tiles = tl.cdiv(dim, BINS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles) * BINS + tl.arange(0, BINS)
    start = tl.load(starts + column, mask=column < dim, other=0)
    end = tl.load(starts + column + 1, mask=column < dim, other=0)
    entries = values + row[:, None] * stride
    total = tl.zeros((ROWS, BINS), dtype=tl.float32)
    for turn in range(0, tl.max(end - start)):
        mine = (start + turn < end)[None, :]
        # Loaded as a row: Triton 3.6 and 3.7 lay out the mask and the addresses of a vector of their own unlike.
        code = tl.load(codes + (start + turn)[None, :], mask=mine, other=0)
        place = (code >> 1) & 0xFFFFFFFF
        entry = tl.load(entries + place, mask=(row < rows)[:, None] & mine, other=0.0).to(tl.float32)
        total += tl.where(code & 1 != 0, -entry, entry)
    tl.store(sums + row[:, None] * dim + column[None, :], total, mask=(row < rows)[:, None] & (column < dim)[None, :])


def count_sketch(rows: Tensor, codes: Tensor, starts: Tensor) -> Tensor:
    """Count sketches of rows by one side's table: [n, width], entries of a row side by side -> [n, dim], float32."""
    count, dim = rows.shape[0], starts.shape[0] - 1
    sums = torch.empty(count, dim, dtype=torch.float32, device=rows.device)
    configuration = shipped(dim)
    programs = triton.cdiv(count, configuration.constants["ROWS"]) * triton.cdiv(dim, configuration.constants["BINS"])
    launch_kernel(gather_kernel, programs, configuration, rows, codes, starts, sums, rows.stride(0), count, dim)
    return sums


@triton.jit(do_not_specialize=["width", "blocks"])
def spectra_kernel(left, right, pieces, shares, width, blocks, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    """One run of rows, some frequencies: the sum of left times right; real and imaginary parts side by side."""
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * (2 * BLOCK_W) + tl.arange(0, 2 * BLOCK_W)
    begin, end = tl.load(pieces + 2 * piece), tl.load(pieces + 2 * piece + 1)
    real = tl.zeros((BLOCK_T, BLOCK_W), dtype=tl.float32)
    imaginary = tl.zeros((BLOCK_T, BLOCK_W), dtype=tl.float32)
    for first in range(begin, end, BLOCK_T):
        row = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_T)
        inside = (row < end)[:, None] & (column < 2 * width)[None, :]
        at = row[:, None] * (2 * width) + column[None, :]
        a = tl.reshape(tl.load(left + at, mask=inside, other=0.0), (BLOCK_T, BLOCK_W, 2))
        b = tl.reshape(tl.load(right + at, mask=inside, other=0.0), (BLOCK_T, BLOCK_W, 2))
        a_real, a_imaginary = tl.split(a)
        b_real, b_imaginary = tl.split(b)
        real += a_real * b_real - a_imaginary * b_imaginary
        imaginary += a_real * b_imaginary + a_imaginary * b_real
    total = tl.reshape(tl.join(tl.sum(real, 0), tl.sum(imaginary, 0)), (2 * BLOCK_W,))
    tl.store(shares + piece * (2 * width) + column, total, mask=column < 2 * width)


def multiply_spectra(left: Tensor, right: Tensor, pieces: Tensor) -> Tensor:
    """Sums over runs of rows of products of spectra.

    Args:
        left: [n, frequencies], complex64.
        right: the same of the other side.
        pieces: first row and end of every run, [P, 2], int64.

    Returns:
        [P, 2 frequencies], float32: real and imaginary parts side by side.
    """
    width = left.shape[1]
    left, right = torch.view_as_real(left.contiguous()), torch.view_as_real(right.contiguous())
    shares = torch.empty(len(pieces), 2 * width, dtype=torch.float32, device=left.device)
    blocks = triton.cdiv(width, SPECTRA.constants["BLOCK_W"])
    launch_kernel(spectra_kernel, len(pieces) * blocks, SPECTRA, left, right, pieces, shares, width, blocks)
    return shares


def compile_cases() -> Iterator[CompileCase]:
    """Codes, gathers for every element type, and the product of spectra."""
    numbers = dict.fromkeys(("seed_low", "seed_high", "count", "dim", "side"), "i32")
    yield CompileCase("tensorsketch codes", codes_kernel, CODES, {"codes": "*i64", **numbers},
                      {"KIND": TENSORSKETCH}, aligned=False)  # fmt: skip
    for dtype, configuration in product(DTYPES, GATHER):
        types = {"values": POINTERS[dtype], "codes": "*i64", "starts": "*i64", "sums": "*fp32"}
        types |= dict.fromkeys(("stride", "rows", "dim"), "i32")
        name = f"tensorsketch gather {configuration.constants['BINS']} {name_of(dtype)}"
        yield CompileCase(name, gather_kernel, configuration, types, counts=("rows", "dim"))
    types = {"left": "*fp32", "right": "*fp32", "pieces": "*i64", "shares": "*fp32", "width": "i32", "blocks": "i32"}
    yield CompileCase("tensorsketch spectra", spectra_kernel, SPECTRA, types, counts=("width", "blocks"))
