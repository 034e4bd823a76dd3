"""`factored_sketch` on Triton: rows sketched in blocks, then one product a run of rows, all samples in one launch.

A run is at most some hundred rows of one sample, so that a long sample is dealt out to many programs and short ones
take one each; runs of a sample are added in float64, in order. The sketched rows, N (k_out + k_in) numbers, pass
through memory: to keep them in registers a program would have to own its rows from the first coordinate to the last,
and too few would run at once, to save a few hundredths of the traffic of reading x and dy.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.factored_sketch import BLOCK_ENTRIES, for_each_seed, sample_groups
from fillm_kernels.sides import sides_of
from fillm_kernels.triton.configurations import CompileCase, Configuration, launch_kernel
from fillm_kernels.triton.projection import parts_of, project
from fillm_kernels.triton.tensorsketch import count_sketch, multiply_spectra, table
from fillm_kernels.triton.tiles import multiply, ragged_case, sum_segments, tables_to_device, unit_rows

# untimed; chosen by `python -m fillm_kernels.compile_check`: 32 to 61 registers; 32 rows a step spilled on
# sm_80 (6), 4 warps on sm_90 with Triton 3.6 (11).
PRODUCT = Configuration({"BLOCK_O": 32, "BLOCK_I": 32, "BLOCK_K": 16}, num_warps=8, num_stages=2)
RUN = 256  # rows of a run; more where results would otherwise outweigh the sketched rows
SPECTRA_RUN = 128


@triton.jit
def summed(parts, splits, rows, dim, row, column, inside):
    """Rows of a sketch that lies in parts [splits, rows, dim]: row [K], int64, column [C] -> [K, C], float32."""
    kept = inside[:, None] & (column < dim)[None, :]
    total = tl.load(parts + row[:, None] * dim + column[None, :], mask=kept, other=0.0)
    for split in range(1, splits):
        place = parts + (split * rows + row[:, None]) * dim + column[None, :]
        total += tl.load(place, mask=kept, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows", "left_splits", "right_splits"])
def product_kernel(
    left, right, pieces, shares, rows, left_splits, right_splits, outputs, inputs, scale,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [k_out, k_in] of the product of one run of rows."""
    across = tl.cdiv(inputs, BLOCK_I)
    tiles = across * tl.cdiv(outputs, BLOCK_O)
    piece = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    output = (tile // across) * BLOCK_O + tl.arange(0, BLOCK_O)
    feature = (tile % across) * BLOCK_I + tl.arange(0, BLOCK_I)
    begin, end = tl.load(pieces + 2 * piece), tl.load(pieces + 2 * piece + 1)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        row = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_K)
        a = summed(left, left_splits, rows, outputs, row, output, row < end)
        b = summed(right, right_splits, rows, inputs, row, feature, row < end)
        total = multiply(tl.trans(a), b, total, False)
    kept = (output < outputs)[:, None] & (feature < inputs)[None, :]
    place = shares + (piece * outputs + output[:, None]) * inputs + feature[None, :]
    tl.store(place, total * scale, mask=kept)


class Block(NamedTuple):
    """Rows that are sketched at a time, and what of the tables belongs to them.

    Attributes:
        rows: of x and dy.
        samples: whose rows they are; one sample if it has rows in other blocks too.
        pieces: rows of the table of runs.
        segments: entries of the table of first runs; one more than samples.
    """

    rows: slice
    samples: slice
    pieces: slice
    segments: slice


@lru_cache(maxsize=16)  # the layers of one batch ask with the same offsets, and few shapes
def plan(bounds: tuple[int, ...], step: int, run: int) -> tuple[list[Block], Tensor, Tensor]:
    """Blocks of at most `step` rows, and runs of at most `run` rows of one sample in them.

    Where either is cut depends on the rows of the sample alone, and so do the sample's bits.

    Args:
        bounds: offsets, [B + 1].
        step: rows of a block.
        run: rows of a run.

    Returns:
        The blocks; first row and end of every run, within its block, [P, 2] (an empty sample has one run of no rows);
        for every block the first run of each of its samples, within the block, and their number. int64, on the host.
    """
    blocks, pieces, segments = [], [], []
    for first, last in sample_groups(bounds, step):
        for begin in range(bounds[first], max(bounds[last], bounds[first] + 1), step):
            before, entries = len(pieces), len(segments)
            end = min(begin + step, bounds[last])
            for low, high in pairwise(bounds[first : last + 1]):
                segments.append(len(pieces) - before)
                low, high = max(low, begin) - begin, min(high, end) - begin
                starts = range(low, max(high, low + 1), run)
                pieces += [(start, min(start + run, high)) for start in starts]
            segments.append(len(pieces) - before)
            rows, samples = slice(begin, end), slice(first, last)
            blocks.append(Block(rows, samples, slice(before, len(pieces)), slice(entries, len(segments))))
    return blocks, torch.tensor(pieces, dtype=torch.int64).view(-1, 2), torch.tensor(segments, dtype=torch.int64)


def launch(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seeds: list[int]) -> Tensor:
    """Two-sided sketches. [N, I], [N, O], [B + 1] on the host -> [B, maps k_out k_in] or [B, maps k], float32."""
    return for_each_seed(_one_map)(x, dy, offsets, dims, kind, seeds)


def _one_map(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seed: int) -> Tensor:
    samples = offsets.shape[0] - 1
    if x.numel() == 0 or dy.numel() == 0:
        return x.new_zeros(samples, math.prod(dims), dtype=torch.float32)
    x, dy, bounds = unit_rows(x), unit_rows(dy), tuple(offsets.tolist())
    if kind == "tensorsketch":
        return _folded(x, dy, bounds, dims[0], seed)
    sides = sides_of(kind, seed, dims)
    out = torch.zeros(samples, math.prod(dims), dtype=torch.float32, device=x.device)
    numbers = sum(parts_of(m.shape[1], *side[:2]) * side[0] for m, side in zip((dy, x), sides, strict=True))
    blocks, pieces, segments = plan(bounds, max(1, BLOCK_ENTRIES // numbers), max(RUN, math.prod(dims) // sum(dims)))
    pieces, segments = tables_to_device((pieces, segments), x.device)
    tiles = triton.cdiv(dims[0], PRODUCT.constants["BLOCK_O"]) * triton.cdiv(dims[1], PRODUCT.constants["BLOCK_I"])
    for block in blocks:
        own = pieces[block.pieces]
        shares = torch.empty(len(own), math.prod(dims), dtype=torch.float32, device=x.device)
        if block.rows.stop > block.rows.start:
            (left, left_scale), (right, right_scale) = (
                project(matrix[block.rows], *side) for matrix, side in zip((dy, x), sides, strict=True)
            )
            launch_kernel(
                product_kernel, len(own) * tiles, PRODUCT, left, right, own, shares, left.shape[1], left.shape[0],
                right.shape[0], *dims, left_scale * right_scale,
            )  # fmt: skip
            out[block.samples] += _by_sample(shares, segments[block.segments])
    return out


def _folded(x: Tensor, dy: Tensor, bounds: tuple[int, ...], dim: int, seed: int) -> Tensor:
    """TensorSketch: spectra of count sketches multiplied and summed by sample, then transformed back. [B, dim]."""
    tables = [table(matrix.shape[1], dim, seed, side, x.device) for side, matrix in enumerate((dy, x))]
    sums = torch.zeros(len(bounds) - 1, dim // 2 + 1, 2, dtype=torch.float32, device=x.device)
    blocks, pieces, segments = plan(bounds, max(1, BLOCK_ENTRIES // dim), SPECTRA_RUN)
    pieces, segments = tables_to_device((pieces, segments), x.device)
    for block in blocks:
        if block.rows.stop > block.rows.start:
            left, right = (
                torch.fft.rfft(count_sketch(matrix[block.rows], *of))
                for matrix, of in zip((dy, x), tables, strict=True)
            )
            shares = multiply_spectra(left, right, pieces[block.pieces])
            sums[block.samples] += _by_sample(shares, segments[block.segments]).view(-1, dim // 2 + 1, 2)
    return torch.fft.irfft(torch.view_as_complex(sums), n=dim)


def _by_sample(shares: Tensor, segments: Tensor) -> Tensor:
    """Sums over the runs of each sample, [P, W] -> [samples, W]; the runs themselves where each sample has one."""
    return shares if len(shares) == len(segments) - 1 else sum_segments(shares, segments)


def small_case(
    dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor, list[int], str, list[int]]]:
    """Every kind, with empty samples and several parts of a row or runs of a sample, for the check at first use."""
    several_parts, several_runs = ([5, 0, 20, 1], 1040), ([5, 0, 130, 1], 40)
    kinds = (([5, 24], "factored", several_parts), ([8, 12], "factored-sjlt", several_parts))
    return [
        (*ragged_case(lengths, inputs, 24, dtype, device), dims, kind, [3])
        for dims, kind, (lengths, inputs) in (*kinds, ([24], "tensorsketch", several_runs))
    ]


def compile_cases() -> Iterator[CompileCase]:
    """The product of sketched rows, for sides that are multiples of 16 and others."""
    types = {"left": "*fp32", "right": "*fp32", "pieces": "*i64", "shares": "*fp32"}
    types |= {**dict.fromkeys(("rows", "left_splits", "right_splits", "outputs", "inputs"), "i32"), "scale": "fp32"}
    for aligned in (True, False):
        name = f"factored_sketch product{'' if aligned else ' odd'}"
        counts = ("rows", "left_splits", "right_splits")
        yield CompileCase(name, product_kernel, PRODUCT, types, aligned=aligned, counts=counts)
