"""The two sides of a `factored_sketch`: the maps that the rows of dy and those of x go through.

A side is a matrix with a row for every coordinate. `side_sketch` multiplies rows by it, `side_rows` reads rows off it:
what a one-hot vector is sketched to, as an embedding's gradient needs it. docs/kernels/factored_sketch.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fillm_kernels.arguments import accumulation_dtype, as_integer, as_tensor
from fillm_kernels.errors import DtypeError, ShapeError
from fillm_kernels.seed_law import LARGEST_DIM, SIGN, START, BlockMap, below, cell, keys, negative, normal, tensor_seed
from fillm_kernels.sketch import sketch

SKETCH_OF_A_SIDE = {"factored": "gaussian", "factored-sjlt": "sjlt"}
KINDS = (*SKETCH_OF_A_SIDE, "tensorsketch")
SIDES = ("out", "in")  # of dy, of x
NONZEROS = 4  # bins a coordinate goes into on either side of factored-sjlt, where that divides the dimension


def side_rows(
    coordinates: Tensor | Any,
    side: str,
    dims: int | Sequence[int],
    kind: str = "factored",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of one side's map: what the unit vectors of some coordinates are sketched to.

    An embedding's gradient, row `id_t` of which receives `dy_t`, is sketched to `sum_t side_rows(id)_t^T
    side_sketch(dy)_t`, and no one-hot vector is in memory. docs/seed-law.md.

    Args:
        coordinates: [N], int64, at least 0, in any order and repeated at will.
        side: `out` (the map of dy) or `in` (of x).
        dims: as `factored_sketch` takes it.
        kind: of `factored_sketch`.
        seed: the map's seed, in [0, 2^63).
        dtype: float32 or float64.

    Returns:
        [N, k_out] or [N, k_in] ([N, k] for `tensorsketch`), on the device of `coordinates`.

    Raises:
        ShapeError: if dims, kind, side or seed are out of range.
        DtypeError: if `coordinates` is no int64 array.
    """
    coordinates = as_tensor(coordinates, "coordinates")
    if coordinates.dtype != torch.int64 or coordinates.ndim != 1:
        found = f"{coordinates.dtype}, {list(coordinates.shape)}"
        raise DtypeError(f"coordinates must be [N], int64; got {found}")
    dims = checked_dims(dims, kind, seed)
    if kind == "tensorsketch":
        bins, signs = tensorsketch_side(coordinates, dims[0], seed, side)
        rows = torch.zeros(coordinates.shape[0], dims[0], dtype=dtype, device=coordinates.device)
        return rows.scatter_(1, bins[:, None], signs[:, None].to(dtype))
    return projection_rows(coordinates, *sides_of(kind, seed, dims)[side_number(side)]).to(dtype)


def side_sketch(
    rows: Tensor | Any, side: str, dims: int | Sequence[int], kind: str = "factored", seed: int = 0
) -> Tensor:
    """Sketches rows of dy or of x by one side's map.

    Args:
        rows: [N, O] (side `out`) or [N, I] (side `in`), float32 | bfloat16 | float16 | float64.
        side: `out` (the map of dy) or `in` (of x).
        dims: as `factored_sketch` takes it.
        kind: `factored` or `factored-sjlt`; the sides of a TensorSketch are given by `tensorsketch_side`.
        seed: the map's seed, in [0, 2^63).

    Returns:
        [N, k_out] or [N, k_in], float32 (float64 for float64).

    Raises:
        ShapeError: if dims, kind, side or seed are out of range.
        DtypeError: if `rows` is no floating array.
    """
    dims = checked_dims(dims, kind, seed)
    if kind == "tensorsketch":
        raise ShapeError("side_sketch takes the kinds factored and factored-sjlt; see tensorsketch_side")
    dim, one, own, nonzeros = sides_of(kind, seed, dims)[side_number(side)]
    return sketch(rows, dim, one, own, nonzeros=nonzeros)


def tensorsketch_side(coordinates: Tensor, dim: int, seed: int, side: str) -> tuple[Tensor, Tensor]:
    """Bins and signs of one side of a TensorSketch: entry (o, i) falls on bin `(out_o + in_i) mod dim`, signs multiply.

    Every coordinate gets a bin of its own hash. The rotated blocks of `sketch` would not do here: bins of two sides
    add, and within a block i + o' and i' + o meet with certainty where i - i' = o - o'.

    Args:
        coordinates: [N], int64, at least 0.
        dim: k.
        seed: the map's seed, in [0, 2^63).
        side: `out` or `in`.

    Returns:
        [N] int64 in [0, dim), and [N] int64, +1 or -1, on the device of `coordinates`.

    Raises:
        ShapeError: if dim, side or seed are out of range.
    """
    checked_dims(dim, "tensorsketch", seed)
    number = side_number(side)
    bins = below(cell(keys(seed, "tensorsketch", START, number), coordinates, 0), dim)
    return bins, 1 - 2 * negative(keys(seed, "tensorsketch", SIGN, number), coordinates, 0)


def listed(dims: int | Sequence[int], kind: str) -> list[int]:
    """`dims` as the registered op takes it; one k serves both sides."""
    sides = [as_integer(dim, "dims") for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
    return sides * 2 if kind in SKETCH_OF_A_SIDE and len(sides) == 1 else sides


def checked_dims(dims: int | Sequence[int], kind: str, seed: int) -> list[int]:
    """`listed`, refused with a `ShapeError` if there is no such map."""
    sides = listed(dims, kind)
    if kind not in KINDS:
        raise ShapeError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if len(sides) != (1 if kind == "tensorsketch" else 2):
        raise ShapeError(f"dims must be (k_out, k_in), or one k for tensorsketch; got {sides} for {kind}")
    if min(sides) < 1 or math.prod(sides) > LARGEST_DIM:
        raise ShapeError(f"dims must be at least 1 and their product at most 2^30; got {sides}")
    if seed < 0:
        raise ShapeError(f"seed must be in [0, 2^63); got {seed}")
    return sides


def side_number(side: str) -> int:
    """0 for `out`, 1 for `in`."""
    if side not in SIDES:
        raise ShapeError(f"side must be 'out' (of dy) or 'in' (of x); got {side!r}")
    return SIDES.index(side)


def sides_of(kind: str, seed: int, dims: list[int]) -> list[tuple[int, str, int, int]]:
    """What `sketch` is given for dy and for x: (dim, kind, seed, nonzeros)."""
    seeds = (tensor_seed(seed, side) for side in SIDES)
    return [(k, SKETCH_OF_A_SIDE[kind], one, math.gcd(k, NONZEROS)) for k, one in zip(dims, seeds, strict=True)]


def projection_rows(coordinates: Tensor, dim: int, kind: str, seed: int, nonzeros: int) -> Tensor:
    """Rows of a projection, [N] -> [N, dim], float64, entry by entry from the seed law."""
    if kind == "gaussian":
        column = torch.arange(dim, device=coordinates.device)
        return normal(seed, kind, coordinates[:, None], column) / math.sqrt(dim)
    law = BlockMap.of(kind, seed, dim, nonzeros)
    matrix = torch.zeros(coordinates.shape[0], dim, dtype=torch.float64, device=coordinates.device)
    for chunk in range(law.chunks):
        bins, bits = law.place(coordinates, chunk)
        matrix.scatter_(1, bins[:, None], ((1 - 2 * bits).double() * law.scale)[:, None])
    return matrix


class CountSketch:
    """One side of a TensorSketch for rows of a matrix: bins filled one coordinate each at a time, so never two at once
    (an `index_add_` on CUDA adds in an order of its own).
    """

    def __init__(self, width: int, dim: int, seed: int, side: str, device: torch.device) -> None:
        bins, signs = tensorsketch_side(torch.arange(width), dim, seed, side)
        order = bins.argsort(stable=True)
        loads = bins.bincount(minlength=dim)
        turn = torch.arange(width) - (loads.cumsum(0) - loads)[bins[order]]  # how many came into the bin before
        turns = [order[turn == number] for number in range(int(loads.max()))]
        self.turns = [(bins[some].to(device), some.to(device), signs[some].to(device)) for some in turns]
        self.dim = dim

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, width] -> [n, dim], float32 or float64."""
        out = torch.zeros(rows.shape[0], self.dim, dtype=accumulation_dtype(rows.dtype), device=rows.device)
        for bins, coordinates, signs in self.turns:
            out[:, bins] += rows[:, coordinates].to(out.dtype) * signs
        return out
