"""Triton kernel of `ghost_gram`: tiles of both cross-Gram matrices, multiplied in registers, one number per pair.

Rows of either side are cut into tiles of equal size wherever samples begin, so no tile is partly empty; a sample's part
in a tile is a piece. A program forms a tile of x1 x2^T and one of dy1 dy2^T, multiplies them entry by entry and writes
one number per pair of pieces. Numbers of one sample pair are added in float64, in order.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.triton.configurations import (
    DTYPES,
    POINTERS,
    CompileCase,
    Configuration,
    is_aligned,
    launch_kernel,
    name_of,
    widen,
)
from fillm_kernels.triton.tiles import cross_products, ragged_case, sum_segments, tables_to_device, unit_rows

# untimed; chosen by `python -m fillm_kernels.compile_check`, bfloat16, registers / KiB of shared memory, no spill:
#              sm_80       sm_90       sm_100      gfx942
#   HALF       210 / 64    254 / 96    237 / 96    158 / 64    two float32 tiles of 128 x 128 are half of all registers
#   ODD        172 / 8     128 / 8     109 / 16    103 / 4     at odd widths and strides HALF spills (320 on sm_90)
HALF = Configuration({"BLOCK_T": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3)
ODD = Configuration({"BLOCK_T": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=2)
FLOAT = Configuration({"BLOCK_T": 64, "BLOCK_K": 16, "GROUP": 8}, num_warps=8, num_stages=2)


def shipped(dtype: torch.dtype, aligned: bool) -> Configuration:
    """The configuration for an element type."""
    return FLOAT if dtype == torch.float32 else HALF if aligned else ODD


@triton.jit
def cross_gram_kernel(
    x1_ptr,
    dy1_ptr,
    x2_ptr,
    dy2_ptr,
    pieces1_ptr,
    tiles1_ptr,
    pieces2_ptr,
    tiles2_ptr,
    shares_ptr,
    tiles1,
    tiles2,
    pieces2,
    inputs,
    outputs,
    x1_stride,
    dy1_stride,
    x2_stride,
    dy2_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One pair of tiles: sum of (x1_t . x2_s)(dy1_t . dy2_s) over every pair of pieces."""
    # Programs that run at the same time share rows of either side: GROUP tiles of side 1, tile by tile of side 2.
    group = tl.program_id(0) // (GROUP * tiles2)
    height = tl.minimum(tiles1 - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles2)
    tile1, tile2 = group * GROUP + within % height, within // height
    first1, last1 = tl.load(tiles1_ptr + tile1), tl.load(tiles1_ptr + tile1 + 1)
    first2, last2 = tl.load(tiles2_ptr + tile2), tl.load(tiles2_ptr + tile2 + 1)
    left = tl.load(pieces1_ptr + first1) + tl.arange(0, BLOCK_T)  # [BLOCK_T], int64
    right = tl.load(pieces2_ptr + first2) + tl.arange(0, BLOCK_T)
    # Rows past the last one repeat it, so that no load needs a mask of rows; no piece holds them.
    left_rows = tl.minimum(left, tl.load(pieces1_ptr + last1) - 1)
    right_rows = tl.minimum(right, tl.load(pieces2_ptr + last2) - 1)
    pairs = cross_products(x1_ptr, x2_ptr, left_rows, right_rows, x1_stride, x2_stride, inputs, BLOCK_T, BLOCK_K, WIDEN)
    pairs = pairs * cross_products(
        dy1_ptr, dy2_ptr, left_rows, right_rows, dy1_stride, dy2_stride, outputs, BLOCK_T, BLOCK_K, WIDEN
    )
    for piece2 in range(first2, last2):
        begin2, end2 = tl.load(pieces2_ptr + piece2), tl.load(pieces2_ptr + piece2 + 1)
        sums = tl.sum(tl.where(((right >= begin2) & (right < end2))[None, :], pairs, 0.0), 1, keep_dims=True)
        for piece1 in range(first1, last1):
            begin1, end1 = tl.load(pieces1_ptr + piece1), tl.load(pieces1_ptr + piece1 + 1)
            share = tl.sum(tl.where(((left >= begin1) & (left < end1))[:, None], sums, 0.0))
            tl.store(shares_ptr + tl.cast(piece1, tl.int64) * pieces2 + piece2, share)


@lru_cache(maxsize=32)  # the layers of one batch ask with the same offsets
def plan(bounds: tuple[int, ...], block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of one side.

    Args:
        bounds: offsets, [B + 1], at least one row in all.
        block: rows of a tile.

    Returns:
        First row of each piece and N, [P + 1]; first piece of each tile and P, [tiles + 1]; first piece of each sample
        and P, [B + 1]. int64, on the host.
    """
    offsets, edges = torch.tensor(bounds), torch.arange(0, bounds[-1] + block, block).clamp(max=bounds[-1])
    rows = torch.cat([offsets, edges]).unique()
    return rows, torch.searchsorted(rows, edges), torch.searchsorted(rows, offsets)


def launch(x1: Tensor, dy1: Tensor, offsets1: Tensor, x2: Tensor, dy2: Tensor, offsets2: Tensor) -> Tensor:
    """Inner products of all pairs of gradients. Two ragged sets -> [B1, B2], float64."""
    if min(x1.numel(), dy1.numel(), x2.numel(), dy2.numel()) == 0:
        size = (offsets1.shape[0] - 1, offsets2.shape[0] - 1)
        return torch.zeros(size, dtype=torch.float64, device=x1.device)
    x1, dy1, x2, dy2 = (unit_rows(matrix) for matrix in (x1, dy1, x2, dy2))
    configuration = shipped(x1.dtype, is_aligned((x1, dy1, x2, dy2)))
    block = configuration.constants["BLOCK_T"]
    plans = plan(tuple(offsets1.tolist()), block) + plan(tuple(offsets2.tolist()), block)
    pieces1, tiles1, samples1, pieces2, tiles2, samples2 = tables_to_device(plans, x1.device)
    shares = torch.empty(len(pieces1) - 1, len(pieces2) - 1, dtype=torch.float32, device=x1.device)
    tables = (pieces1, tiles1, pieces2, tiles2, shares)
    sizes = (len(tiles1) - 1, len(tiles2) - 1, len(pieces2) - 1, x1.shape[1], dy1.shape[1])
    strides = (x1.stride(0), dy1.stride(0), x2.stride(0), dy2.stride(0))
    arguments = (x1, dy1, x2, dy2, *tables, *sizes, *strides)
    launch_kernel(cross_gram_kernel, sizes[0] * sizes[1], configuration, *arguments, WIDEN=widen())
    by_first = sum_segments(shares, samples1)  # [B1, P2]
    return sum_segments(by_first.T.contiguous(), samples2).T


def small_case(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Short, long and empty samples, at aligned and other widths, for the check at first use."""
    return [
        (*ragged_case([5, 0, 150, 1], *widths, dtype, device), *ragged_case([140, 9], *widths, dtype, device))
        for widths in ((80, 48), (72, 40))
    ]


def compile_cases() -> Iterator[CompileCase]:
    """Every configuration above."""
    for dtype, aligned in product(DTYPES, (True, False)):
        types = dict.fromkeys(("x1_ptr", "dy1_ptr", "x2_ptr", "dy2_ptr"), POINTERS[dtype])
        types |= dict.fromkeys(("pieces1_ptr", "tiles1_ptr", "pieces2_ptr", "tiles2_ptr"), "*i64")
        types |= {"shares_ptr": "*fp32", **dict.fromkeys(("tiles1", "tiles2", "pieces2", "inputs", "outputs"), "i32")}
        types |= dict.fromkeys(("x1_stride", "dy1_stride", "x2_stride", "dy2_stride"), "i32")
        counts, constants = ("tiles1", "tiles2", "pieces2"), {"WIDEN": False}
        half, name = dtype != torch.float32, f"ghost_gram {name_of(dtype, aligned)}"
        yield CompileCase(name, cross_gram_kernel, shipped(dtype, aligned), types, constants, half, aligned, counts)
