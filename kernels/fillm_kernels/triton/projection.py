"""Sketches of many rows for `factored_sketch`: products with a projection that is made once a call.

One side of `factored` and `factored-sjlt` is narrow, and rows are many: entries made in registers would be made again
for every few rows. So the projection is written once, some megabytes at most, and the rows are multiplied by it. A
sparse projection holds -1, 0 and 1, exact in bfloat16: on the matrix units its product with rows of 16 bits takes less
time than reading them, for up to some 200 bins, and no row is scattered. Gaussian entries beside bfloat16 rows, and
float32 rows beside a sparse projection, are cut into three bfloat16 parts that hold all 24 bits.
"""

from collections.abc import Iterator
from itertools import product
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
    is_aligned,
    launch_kernel,
    name_of,
    widen,
)
from fillm_kernels.triton.seed_law import halves, normal, place
from fillm_kernels.triton.sketch import launch as launch_sketch
from fillm_kernels.triton.tiles import cut, multiply

SHARE = 1024  # coordinates of one part of a row's sketch: sizes alone decide, so that bits do not depend on the rows
MATRIX_ENTRIES = 1 << 21  # entries of a projection held at a time
COLUMNS = 1024  # columns of a projection made at a time
MOST_STEPS = 64  # coordinates of a step of any configuration
WIDEST_SPARSE = 512  # bins of a sparse side up to which it is a product; beyond, `sketch` reads the rows once per chunk
GAUSSIAN = tl.constexpr(KINDS.index("gaussian"))

# untimed; chosen by `python -m fillm_kernels.compile_check`, most registers of any element type, no spill:
#                 sm_80   sm_90   sm_100   gfx942
#   HALF           152      72      56       90
#   HALF_WIDE      150      72      64       86     at 4 warps 255 on sm_90
#   CUT            152      96      90      108
#   CUT_WIDE       168     179     118       93     90 KiB of shared memory on sm_90 at most; at 4 warps 255 registers
#   ODD            184     164     134      133
#   FLOAT          116      96      95       66     32 coordinates a step spilled on sm_90 (3)
#   FLOAT_WIDE     110      76      76       46     at 4 warps sm_90 and sm_100 spilled (8), at odd widths sm_80 (2)
HALF = Configuration({"BLOCK_T": 64, "BLOCK_C": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3)
HALF_WIDE = Configuration({"BLOCK_T": 64, "BLOCK_C": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3)
CUT = Configuration({"BLOCK_T": 64, "BLOCK_C": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3)
CUT_WIDE = Configuration({"BLOCK_T": 64, "BLOCK_C": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3)
ODD = Configuration({"BLOCK_T": 64, "BLOCK_C": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2)
FLOAT = Configuration({"BLOCK_T": 64, "BLOCK_C": 32, "BLOCK_K": 16}, num_warps=4, num_stages=2)
FLOAT_WIDE = Configuration({"BLOCK_T": 64, "BLOCK_C": 64, "BLOCK_K": 16}, num_warps=8, num_stages=2)
FILL = Configuration({"BLOCK_K": 64, "BLOCK_C": 32}, num_warps=4, num_stages=1)


class Product(NamedTuple):
    """How rows of one element type are multiplied by a projection of one kind.

    Attributes:
        matrix: element type of the projection.
        planes: 3 where float32 entries of it are cut into bfloat16 parts, else 1.
        cut: whether the rows are.
        widened: whether the rows are widened to float32.
    """

    matrix: torch.dtype
    planes: int
    cut: bool
    widened: bool

    @classmethod
    def of(cls, dtype: torch.dtype, kind: str) -> "Product":
        """The product for an element type of the rows and a kind of projection."""
        if kind == "sjlt":
            return cls(torch.bfloat16 if dtype == torch.float32 else dtype, 1, dtype == torch.float32, False)
        if dtype == torch.bfloat16:
            return cls(torch.bfloat16, 3, False, False)
        # float16 has too few exponents to hold the parts of a float32 number.
        return cls(torch.float32, 1, False, dtype != torch.float32)


def shipped(way: Product, dim: int, aligned: bool) -> Configuration:
    """The configuration for rows sketched to `dim` numbers."""
    if way.matrix == torch.float32:
        return FLOAT if dim <= FLOAT.constants["BLOCK_C"] or not aligned else FLOAT_WIDE
    if not aligned:
        return ODD
    if way.planes == 3 or way.cut:
        return CUT if dim <= CUT.constants["BLOCK_C"] else CUT_WIDE
    return HALF if dim <= HALF.constants["BLOCK_C"] else HALF_WIDE


def parts_of(width: int, dim: int, kind: str) -> int:
    """Parts in which `project` leaves the sketch of a row of `width` entries."""
    return triton.cdiv(width, SHARE) if is_product(dim, kind) else 1


def is_product(dim: int, kind: str) -> bool:
    """Whether rows are multiplied by a projection; a wide sparse side is left to `sketch`."""
    return kind == "gaussian" or dim <= WIDEST_SPARSE


def project(rows: Tensor, dim: int, kind: str, seed: int, nonzeros: int) -> tuple[Tensor, float]:
    """Sketch rows to `dim` numbers each.

    Args:
        rows: [n, width], n and width at least 1, float32 | bfloat16 | float16, entries of a row side by side.
        dim: numbers a row becomes.
        kind: gaussian or sjlt.
        seed: of this side.
        nonzeros: of sjlt.

    Returns:
        [parts, n, dim], float32, to be added up in order, and what the sum has to be multiplied by.
    """
    if not is_product(dim, kind):
        return launch_sketch(rows, dim, kind, seed, nonzeros, 0)[None], 1.0
    (count, width), way = rows.shape, Product.of(rows.dtype, kind)
    configuration = shipped(way, dim, is_aligned((rows,)))
    tile = configuration.constants["BLOCK_C"]
    parts = torch.empty(parts_of(width, dim, kind), count, dim, dtype=torch.float32, device=rows.device)
    for column in range(0, dim, COLUMNS):
        across = triton.cdiv(min(COLUMNS, dim - column), tile)
        slab = max(1, MATRIX_ENTRIES // (across * tile * SHARE)) * SHARE
        for first in range(0, width, slab):
            shares = triton.cdiv(min(slab, width - first), SHARE)
            # Whole steps of any configuration and whole tiles, so that no load of the projection needs a mask.
            height = min(slab, triton.cdiv(width - first, MOST_STEPS) * MOST_STEPS)
            matrix = torch.empty(way.planes, height, across * tile, dtype=way.matrix, device=rows.device)
            fill(matrix, dim, kind, seed, nonzeros, first, width, column)
            launch_kernel(
                project_kernel, triton.cdiv(count, configuration.constants["BLOCK_T"]) * shares * across, configuration,
                rows, matrix, parts, rows.stride(0), count, width, first // SHARE, shares, column // tile, dim, across,
                matrix.stride(0), SHARE=SHARE, PLANES=way.planes, CUT=way.cut, WIDEN=way.widened or widen(),
            )  # fmt: skip
    return parts, dim**-0.5 if kind == "gaussian" else nonzeros**-0.5


def fill(matrix: Tensor, dim: int, kind: str, seed: int, nonzeros: int, first: int, width: int, column: int) -> None:
    """Write a piece of a projection, unscaled, [planes, coordinates from first on, columns from column on].

    Zeros from coordinate `width` and column `dim` on.
    """
    law = BlockMap.of("sjlt", seed, dim, nonzeros if kind == "sjlt" else 1)
    planes, height, columns = matrix.shape
    across = columns // FILL.constants["BLOCK_C"]
    launch_kernel(
        fill_kernel, height // FILL.constants["BLOCK_K"] * across, FILL, matrix, *halves(seed), first, width, column,
        dim, law.width, law.chunks, across, matrix.stride(0), KIND=KINDS.index(kind), PLANES=planes,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first", "column", "dim", "run", "chunks", "across"])
def fill_kernel(
    matrix, seed_low, seed_high, first, width, column, dim, run, chunks, across, plane,
    KIND: tl.constexpr, PLANES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of a projection: coordinates x columns."""
    place_row = (tl.program_id(0) // across) * BLOCK_K + tl.arange(0, BLOCK_K)
    place_column = (tl.program_id(0) % across) * BLOCK_C + tl.arange(0, BLOCK_C)
    coordinate = place_row.to(tl.int64) + first
    own = column + place_column
    if KIND == GAUSSIAN:
        entry = normal(coordinate, own, seed_low, seed_high, KIND)
    else:
        entry = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
        for chunk in range(0, chunks):
            number = seed_low * 0 + chunk  # a tensor in the interpreter too, where a counter is none
            bins, bit = place(coordinate, seed_low, seed_high, run, seed_low * 0 + 1, KIND, number)
            sign = tl.where(bit != 0, -1.0, 1.0)
            entry += tl.where((bins + chunk * run)[:, None] == own[None, :], sign[:, None], 0.0)
    entry = tl.where((coordinate < width)[:, None] & (own < dim)[None, :], entry, 0.0)
    target = matrix + place_row[:, None] * (across * BLOCK_C) + place_column[None, :]
    if PLANES == 1:
        tl.store(target, entry.to(matrix.dtype.element_ty))
    else:
        high, middle, low = cut(entry, matrix.dtype.element_ty)
        tl.store(target, high)
        tl.store(target + plane, middle)
        tl.store(target + 2 * plane, low)


@triton.jit(do_not_specialize=["first", "shares", "tile", "across"])
def project_kernel(
    values, matrix, parts, stride, rows, width, first, shares, tile, dim, across, plane,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    SHARE: tl.constexpr, PLANES: tl.constexpr, CUT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of rows x columns, one share of the coordinates: share `first` and tile `tile` are the projection's."""
    # Programs that run at the same time read the same rows: columns first, then shares.
    program = tl.program_id(0)
    share = (program // across) % shares
    row = (program // across // shares).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    local = (program % across) * BLOCK_C + tl.arange(0, BLOCK_C)
    step = tl.arange(0, BLOCK_K)
    # Rows past the last one repeat it, so that no load needs a mask of rows.
    entries = values + tl.minimum(row, rows - 1)[:, None] * stride
    weights = matrix + share * SHARE * across * BLOCK_C + local[None, :]
    begin = (first + share) * SHARE
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for done in range(0, tl.minimum(width - begin, SHARE), BLOCK_K):
        at = begin + done + step
        a = tl.load(entries + at[None, :], mask=(at < width)[None, :], other=0.0)
        b = weights + (done + step)[:, None] * (across * BLOCK_C)
        if CUT:
            high, middle, low = cut(a, matrix.dtype.element_ty)
            signs = tl.load(b)
            total = multiply(low, signs, total, WIDEN)
            total = multiply(middle, signs, total, WIDEN)
            total = multiply(high, signs, total, WIDEN)
        elif PLANES == 3:
            total = multiply(a, tl.load(b + 2 * plane), total, WIDEN)
            total = multiply(a, tl.load(b + plane), total, WIDEN)
            total = multiply(a, tl.load(b), total, WIDEN)
        else:
            total = multiply(a, tl.load(b), total, WIDEN)
    own = tile * BLOCK_C + local
    target = parts + ((first + share).to(tl.int64) * rows + row[:, None]) * dim + own[None, :]
    tl.store(target, total, mask=(row < rows)[:, None] & (own < dim)[None, :])


def compile_cases() -> Iterator[CompileCase]:
    """Every configuration above, and both fills."""
    for kind, dtype in product(("gaussian", "sjlt"), DTYPES):
        way = Product.of(dtype, kind)
        for aligned in (True, False):
            configurations = {shipped(way, dim, aligned).constants["BLOCK_C"]: dim for dim in (128, 64, 32)}
            for tile, dim in configurations.items():
                types = {"values": POINTERS[dtype], "matrix": POINTERS[way.matrix], "parts": "*fp32"}
                names = ("stride", "rows", "width", "first", "shares", "tile", "dim", "across", "plane")
                types |= dict.fromkeys(names, "i32")
                constants = {"SHARE": SHARE, "PLANES": way.planes, "CUT": way.cut, "WIDEN": way.widened}
                yield CompileCase(
                    f"factored_sketch {kind} rows {tile} {name_of(dtype, aligned)}", project_kernel,
                    shipped(way, dim, aligned), types, constants, way.matrix != torch.float32, aligned,
                    ("rows", "first", "shares", "tile", "dim", "across"),
                )  # fmt: skip
    for kind, matrix in (("gaussian", torch.float32), ("gaussian", torch.bfloat16), ("sjlt", torch.float16)):
        names = ("seed_low", "seed_high", "first", "width", "column", "dim", "run", "chunks", "across", "plane")
        planes = 3 if kind == "gaussian" and matrix == torch.bfloat16 else 1
        yield CompileCase(
            f"factored_sketch {kind} fill {name_of(matrix)}", fill_kernel, FILL,
            {"matrix": POINTERS[matrix], **dict.fromkeys(names, "i32")},
            {"KIND": KINDS.index(kind), "PLANES": planes}, counts=[name for name in names if name != "plane"],
        )  # fmt: skip
