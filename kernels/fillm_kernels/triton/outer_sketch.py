"""Pieces of `sample_moments` that sketch a tile of G_b while it is in registers: `outer_sketch` on Triton.

Where the entries of a tile fall is the same for every sample, so a tile is hashed once. Entries of different tiles, and
of different rows of one, meet in a bin in an order that nobody knows; they are therefore added as integers, where no
order matters: an entry times a power of two of its sample's own, 2^e. With |G_b| <= A_b = sum_t max |dy_t| max |x_t|
entrywise and at most n of them in a bin, n A_b 2^e < 2^60 leaves no overflow, and what is cut off an entry, under
2^-e, is below 2^-58 n A_b: nothing beside float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.seed_law import KINDS, BlockMap
from fillm_kernels.triton.configurations import (
    DTYPES,
    POINTERS,
    CompileCase,
    Configuration,
    launch_kernel,
    name_of,
)
from fillm_kernels.triton.seed_law import halves, place
from fillm_kernels.triton.tiles import sum_segments, to_device

# untimed; one read of x and dy, at most 40 registers on sm_90.
BOUND = Configuration({"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 256}, num_warps=4, num_stages=2)
SPARE_BITS = 60  # of a bin's 63, before those that n takes; A_b is rounded, and so are the sums of G_b


class SketchTarget(NamedTuple):
    """Where and how the kernel of `sample_moments` adds to sketches.

    Attributes:
        law: the map.
        bins: [B, dim], int64, zeros.
        up: what an entry of a sample is multiplied by, 2^e, [B], float32.
        down: what a bin is multiplied by in the end, [B], float64; NaN for a sample with an entry that is not finite.
    """

    law: BlockMap
    bins: Tensor
    up: Tensor
    down: Tensor

    def arguments(self) -> tuple[Tensor | int, ...]:
        """What the kernel takes: bins, scales, the seed's halves, dim, width and ranges."""
        law = self.law
        return self.bins, self.up, *halves(law.seed), law.chunks * law.chunk_dim, law.width, law.ranges

    def constants(self) -> dict[str, int | bool]:
        """The kernel's compile-time constants."""
        return {"SKETCH": True, "KIND": KINDS.index(self.law.kind)}

    def result(self) -> Tensor:
        """The sketches, [B, dim], float64."""
        return self.bins * self.down[:, None]


def sketch_target(x: Tensor, dy: Tensor, offsets: Tensor, law: BlockMap) -> SketchTarget:
    """Bins of zeros and every sample's scale; x [N, I] and dy [N, O] with unit column stride, offsets on the host."""
    count, inputs, outputs = x.shape[0], x.shape[1], dy.shape[1]
    bounds = torch.empty(count, 1, dtype=torch.float64, device=x.device)
    programs = triton.cdiv(count, BOUND.constants["BLOCK_ROWS"])
    launch_kernel(
        row_bound_kernel, programs, BOUND, x, dy, bounds, count, inputs, outputs, x.stride(0), dy.stride(0)
    )  # fmt: skip
    largest = sum_segments(bounds, to_device(offsets, x.device))[:, 0]
    blocks = -(-inputs * outputs // law.width)  # every one of them puts at most one entry into a bin
    up = torch.exp2((SPARE_BITS - blocks.bit_length() - largest.frexp().exponent).clamp(-126, 126).double())
    down = torch.where(largest < 2.0**127, law.scale / up, torch.nan)
    bins = torch.zeros(offsets.shape[0] - 1, law.chunks * law.chunk_dim, dtype=torch.int64, device=x.device)
    return SketchTarget(law, bins, up.float(), down)


@triton.jit
def largest_entry(pointer, rows, inside, width, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Largest magnitude in each of some rows, [BLOCK_ROWS], float64; infinity where an entry is not finite."""
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for begin in range(0, width, BLOCK_COLUMNS):
        column = begin + tl.arange(0, BLOCK_COLUMNS)
        mask = inside[:, None] & (column < width)[None, :]
        entry = tl.abs(tl.load(pointer + rows[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(entry < float("inf"), entry, float("inf")))
    return tl.max(largest, 1).to(tl.float64)


@triton.jit
def row_bound_kernel(
    x_ptr, dy_ptr, bounds_ptr, count, inputs, outputs, x_stride, dy_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bounds max |x_t| max |dy_t| of every row, [N], float64; infinity where an entry is not finite."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    of_x = largest_entry(x_ptr, rows, inside, inputs, x_stride, BLOCK_ROWS, BLOCK_COLUMNS)
    of_dy = largest_entry(dy_ptr, rows, inside, outputs, dy_stride, BLOCK_ROWS, BLOCK_COLUMNS)
    finite = (of_x < float("inf")) & (of_dy < float("inf"))
    product = tl.where(finite, of_x, 1.0) * tl.where(finite, of_dy, 1.0)
    tl.store(bounds_ptr + rows, tl.where(finite, product, float("inf")), mask=inside)


@triton.jit
def tile_places(output, feature, inputs, seed_low, seed_high, width, ranges, chunk, KIND: tl.constexpr):
    """Bins within the chunk of a tile's entries, the sign in bit 31: rows [R] and columns [C] -> [R, C], int32."""
    coordinate = output.to(tl.int64)[:, None] * inputs + feature[None, :]
    bins, sign = place(coordinate, seed_low, seed_high, width, ranges, KIND, chunk)
    return bins | (sign << 31).to(tl.int32, bitcast=True)


@triton.jit
def add_tile(bins_ptr, places, gradient, up, kept):
    """Add a tile of a sample's gradient, [R, C] float32, to that sample's bins of one chunk."""
    amount = (gradient * up).to(tl.int64)
    negative = (places >> 31).to(tl.int64)  # -1 where it is subtracted
    amount = (amount ^ negative) - negative
    tl.atomic_add(bins_ptr + (places & 0x7FFFFFFF), amount, mask=kept, sem="relaxed")


def compile_cases() -> list[CompileCase]:
    """The bounds of rows; the kernel of `sample_moments` has cases of its own."""
    cases = []
    for dtype in DTYPES:
        types = {"x_ptr": POINTERS[dtype], "dy_ptr": POINTERS[dtype], "bounds_ptr": "*fp64"}
        types |= dict.fromkeys(("count", "inputs", "outputs", "x_stride", "dy_stride"), "i32")
        for aligned in (True, False):
            name = f"outer_sketch bounds {name_of(dtype, aligned)}"
            cases.append(CompileCase(name, row_bound_kernel, BOUND, types, aligned=aligned, counts=("count",)))
    return cases
