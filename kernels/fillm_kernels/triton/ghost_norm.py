"""Triton kernels of `ghost_norm`: tiles of both Gram matrices, or tiles of the gradient itself.

Gram form: a work item is a pair of row tiles of one sample, or one tile that holds several short samples whole; the two
products of a pair stay in registers, are multiplied there and leave one number per sample. Explicit form: a work item
is a tile of one G_b, squared and summed. The numbers of a sample lie side by side and are added in float64 in their
order, so the bits do not depend on the run or on the card's number of multiprocessors.
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
from fillm_kernels.triton.tiles import (
    cross_products,
    multiply,
    ragged_case,
    row_products,
    sum_segments,
    tables_to_device,
    unit_rows,
)

PACKED_ROWS = 64  # samples up to this long share a tile; 64 rows fill one matrix instruction of a warp group
FIELDS = 7

# untimed; chosen by `python -m fillm_kernels.compile_check`, bfloat16, registers / KiB of shared memory, no spill:
#              sm_80       sm_90       sm_100      gfx942
#   packed     126 / 24    126 / 32    147 / 32    118 / 8
#   same       204 / 32    234 / 48    238 / 48    156 / 16    a tile with itself, each row loaded once
#   paired     212 / 64    252 / 96    239 / 96    156 / 64    two float32 tiles of 128 x 128 are half of all registers
#   explicit   168 / 48    116 / 96     74 / 96    174 / 64
# 64 KiB is all gfx942 has. At odd widths and strides 128 rows spilled (181 LDL and STL on sm_90), and 64 rows with 64
# features a step did on sm_80 (188): ODD_GRAM takes 173 and 128 registers, ODD_EXPLICIT 72 and 54.
HALF_PACKED = Configuration({"BLOCK_T": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4)
HALF_PAIRED = Configuration({"BLOCK_T": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3)
HALF_EXPLICIT = Configuration({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3)
ODD_GRAM = Configuration({"BLOCK_T": 64, "BLOCK_K": 32}, num_warps=8, num_stages=2)
ODD_EXPLICIT = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 32}, num_warps=8, num_stages=2)
FLOAT_GRAM = Configuration({"BLOCK_T": 64, "BLOCK_K": 16}, num_warps=8, num_stages=2)
FLOAT_EXPLICIT = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 16}, num_warps=4, num_stages=2)


def shipped(dtype: torch.dtype, aligned: bool) -> tuple[Configuration, Configuration, Configuration]:
    """Configurations for packed tiles, pairs of tiles and tiles of the gradient."""
    if dtype == torch.float32:
        return FLOAT_GRAM, FLOAT_GRAM, FLOAT_EXPLICIT
    return (HALF_PACKED, HALF_PAIRED, HALF_EXPLICIT) if aligned else (ODD_GRAM, ODD_GRAM, ODD_EXPLICIT)


@triton.jit
def gram_kernel(
    x_ptr,
    dy_ptr,
    offsets_ptr,
    items_ptr,
    shares_ptr,
    inputs,
    outputs,
    x_stride,
    dy_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAME: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One pair of row tiles: sum over its pairs (t, s) of (x_t . x_s)(dy_t . dy_s), sample by sample."""
    item = items_ptr + tl.program_id(0).to(tl.int64) * 7
    left_begin, left_end = tl.load(item), tl.load(item + 1)
    right_begin, right_end = tl.load(item + 2), tl.load(item + 3)
    first, last, share = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    left = left_begin + tl.arange(0, BLOCK_T)  # [BLOCK_T], int64
    right = right_begin + tl.arange(0, BLOCK_T)
    # Rows past the end of a tile repeat its last one, so that no load needs a mask of rows; their products are dropped.
    left_rows = tl.maximum(tl.minimum(left, left_end - 1), 0)
    right_rows = tl.maximum(tl.minimum(right, right_end - 1), 0)
    if SAME:  # nearly all pairs where samples are short
        pairs = row_products(x_ptr, left_rows, x_stride, inputs, BLOCK_T, BLOCK_K, WIDEN)
        pairs = pairs * row_products(dy_ptr, left_rows, dy_stride, outputs, BLOCK_T, BLOCK_K, WIDEN)
    else:
        pairs = cross_products(x_ptr, x_ptr, left_rows, right_rows, x_stride, x_stride, inputs, BLOCK_T, BLOCK_K, WIDEN)
        pairs = pairs * cross_products(
            dy_ptr, dy_ptr, left_rows, right_rows, dy_stride, dy_stride, outputs, BLOCK_T, BLOCK_K, WIDEN
        )
    weight = tl.where(left_begin == right_begin, 1.0, 2.0)  # a pair below the diagonal stands for its mirror image too
    for sample in range(first, last):
        begin, end = tl.load(offsets_ptr + sample), tl.load(offsets_ptr + sample + 1)
        row = (left >= begin) & (left < tl.minimum(end, left_end))
        column = (right >= begin) & (right < tl.minimum(end, right_end))
        own = tl.where(row[:, None] & column[None, :], pairs, 0.0)
        tl.store(shares_ptr + share + sample - first, weight * tl.sum(own))


@triton.jit
def explicit_kernel(
    x_ptr,
    dy_ptr,
    samples_ptr,
    shares_ptr,
    inputs,
    outputs,
    x_stride,
    dy_stride,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of one G_b = dy_b^T x_b: the sum of its squares."""
    across = tl.cdiv(inputs, BLOCK_I)
    tiles = across * tl.cdiv(outputs, BLOCK_O)
    sample = samples_ptr + (tl.program_id(0) // tiles).to(tl.int64) * 3
    tile = tl.program_id(0) % tiles
    begin, end, share = tl.load(sample), tl.load(sample + 1), tl.load(sample + 2)
    out = (tile // across) * BLOCK_O + tl.arange(0, BLOCK_O)
    feature = (tile % across) * BLOCK_I + tl.arange(0, BLOCK_I)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_K)
        inside = (rows < end)[:, None]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + out, mask=inside & (out < outputs)[None, :], other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + feature, mask=inside & (feature < inputs)[None, :], other=0.0)
        total = multiply(tl.trans(dy), x, total, WIDEN)
    tl.store(shares_ptr + share + tile, tl.sum(total * total))


@lru_cache(maxsize=16)  # the layers of one batch ask with the same offsets, and few shapes
def plan(
    bounds: tuple[int, ...], inputs: int, outputs: int, form: str, tile_rows: int, explicit_tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What every program does, and where its numbers go.

    Args:
        bounds: offsets, [B + 1].
        inputs: I.
        outputs: O.
        form: `auto`, `gram` or `explicit`.
        tile_rows: rows of a tile of a sample longer than PACKED_ROWS.
        explicit_tile: side of a tile of G_b.

    Returns:
        Items of packed tiles, of tiles paired with themselves and of other pairs, each [n, 7] (rows of the left and of
        the right tile, samples, first share); explicit samples [n, 3] (rows, first share); first share of each sample,
        [B + 1]. int64, on the host.
    """
    packed, paired, explicit, shares = [], [], [], [0]
    blocks = -(-inputs // explicit_tile) * -(-outputs // explicit_tile)
    for sample in range(len(bounds) - 1):
        begin, end, share = bounds[sample], bounds[sample + 1], shares[-1]
        length = end - begin
        tiles = -(-length // tile_rows)
        rows = min(length, PACKED_ROWS) if length <= PACKED_ROWS else tiles * tile_rows
        # What the tiles compute, padding included: half of the pairs against whole tiles of the gradient.
        longer = rows * (rows + tile_rows) // 2 * (inputs + outputs) > blocks * explicit_tile**2 * length
        if length and (form == "explicit" or (form == "auto" and longer)):
            explicit.append([begin, end, share])
            shares.append(share + blocks)
        elif length <= PACKED_ROWS:
            last = packed[-1] if packed else None
            if last and last[5] == sample and end - last[0] <= PACKED_ROWS:
                last[1] = last[3] = end
                last[5] = sample + 1
            else:
                packed.append([begin, end, begin, end, sample, sample + 1, share])
            shares.append(share + 1)
        else:
            low = torch.tril_indices(tiles, tiles) * tile_rows + begin  # [2, pairs], first rows of left and right tile
            item = torch.empty(low.shape[1], FIELDS, dtype=torch.int64)
            item[:, [0, 2]] = low.T
            item[:, [1, 3]] = (low.T + tile_rows).clamp(max=end)
            item[:, 4], item[:, 5] = sample, sample + 1
            item[:, 6] = torch.arange(share, share + low.shape[1])
            paired.append(item)
            shares.append(share + low.shape[1])
    pairs = torch.cat(paired) if paired else torch.empty(0, FIELDS, dtype=torch.int64)
    same = pairs[:, 0] == pairs[:, 2]
    return (
        torch.tensor(packed, dtype=torch.int64).view(-1, FIELDS),
        pairs[same],
        pairs[~same],
        torch.tensor(explicit, dtype=torch.int64).view(-1, 3),
        torch.tensor(shares),
    )


def launch(x: Tensor, dy: Tensor, offsets: Tensor, form: str) -> Tensor:
    """Squared norms on the matrix units. [N, I], [N, O], [B + 1] on the host -> [B], float64."""
    inputs, outputs = x.shape[1], dy.shape[1]
    if x.numel() == 0 or dy.numel() == 0:
        return torch.zeros(offsets.shape[0] - 1, dtype=torch.float64, device=x.device)
    x, dy = unit_rows(x), unit_rows(dy)
    for_packed, for_paired, for_explicit = shipped(x.dtype, is_aligned((x, dy)))
    tile_rows, side = for_paired.constants["BLOCK_T"], for_explicit.constants["BLOCK_I"]
    tables = plan(tuple(offsets.tolist()), inputs, outputs, form, tile_rows, side)
    shares = torch.empty(int(tables[-1][-1]), 1, dtype=torch.float32, device=x.device)
    packed, same, paired, explicit, bounds, offsets = tables_to_device((*tables, offsets), x.device)
    sizes = (inputs, outputs, x.stride(0), dy.stride(0))
    for items, configuration in ((packed, for_packed), (same, for_paired), (paired, for_paired)):
        constants = {"SAME": items is not paired and x.dtype != torch.float32, "WIDEN": widen()}
        launch_kernel(gram_kernel, len(items), configuration, x, dy, offsets, items, shares, *sizes, **constants)
    blocks = triton.cdiv(inputs, side) * triton.cdiv(outputs, side)
    programs = len(explicit) * blocks
    launch_kernel(explicit_kernel, programs, for_explicit, x, dy, explicit, shares, *sizes, WIDEN=widen())
    return sum_segments(shares, bounds)[:, 0]


def small_case(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor, str]]:
    """Packed, paired and empty samples, in both forms and at aligned and other widths, for the check at first use."""
    return [
        (*ragged_case([5, 0, 40, 150, 1], inputs, outputs, dtype, device), form)
        for inputs, outputs in ((80, 48), (72, 40))
        for form in ("gram", "explicit")
    ]


def compile_cases() -> Iterator[CompileCase]:
    """Every configuration above."""
    scalars = dict.fromkeys(("inputs", "outputs", "x_stride", "dy_stride"), "i32")
    for dtype, aligned in product(DTYPES, (True, False)):
        half, rows = dtype != torch.float32, {"x_ptr": POINTERS[dtype], "dy_ptr": POINTERS[dtype]}
        gram = {**rows, "offsets_ptr": "*i64", "items_ptr": "*i64", "shares_ptr": "*fp32", **scalars}
        whole = {**rows, "samples_ptr": "*i64", "shares_ptr": "*fp32", **scalars}
        for_packed, for_paired, for_explicit = shipped(dtype, aligned)
        kinds = {"packed": for_packed, "same": for_paired, "paired": for_paired, "explicit": for_explicit}
        if for_packed == for_paired:
            del kinds["packed"]
        if not half:  # bound by arithmetic, and on sm_90 the single load spilled (36)
            del kinds["same"]
        for kind, configuration in kinds.items():
            kernel, types = (explicit_kernel, whole) if kind == "explicit" else (gram_kernel, gram)
            name = f"ghost_norm {kind} {name_of(dtype, aligned)}"
            constants = {"WIDEN": False} if kind == "explicit" else {"SAME": kind != "paired", "WIDEN": False}
            yield CompileCase(name, kernel, configuration, types, constants, half, aligned)
