"""`factored_sketch`: per-sample weight gradients sketched from both sides, never formed.

    S_out G_b S_in^T = sum_t (S_out dy_t)(S_in x_t)^T                 LoGra, arXiv 2405.13954; GraSS, arXiv 2505.18976
    TS(G_b) = sum_t C_out dy_t * C_in x_t   (* circular convolution)  TensorSketch, Pham and Pagh, KDD 2013

The rows of x and dy are sketched first, N (k_out + k_in) numbers a block of rows at a time, and multiplied sample by
sample. E <S G, S H> = <G, H>; docs/method.md section 5, docs/kernels/factored_sketch.md.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fillm_kernels.arguments import accumulation_dtype, as_integer, as_tensor, check_offsets, check_ragged
from fillm_kernels.dispatch import Backend, register, select, triton_backend
from fillm_kernels.errors import ShapeError
from fillm_kernels.products import ieee_products, product_by_entry
from fillm_kernels.seed_law import LARGEST_DIM, SIGN, START, BlockMap, below, cell, keys, negative, normal, tensor_seed
from fillm_kernels.sketch import sketch

SIDES = {"factored": "gaussian", "factored-sjlt": "sjlt"}  # the sketch of either side
KINDS = (*SIDES, "tensorsketch")
NONZEROS = 4  # bins a coordinate goes into on either side of factored-sjlt, where that divides the dimension
BLOCK_ENTRIES = 1 << 21  # entries of the sketched rows held at a time


def factored_sketch(
    x: Tensor | Any,
    dy: Tensor | Any,
    offsets: Tensor | Any,
    dims: int | Sequence[int],
    kind: str = "factored",
    seed: int = 0,
) -> Tensor:
    """Sketch every per-sample weight gradient G_b = dy_b^T x_b from both sides, without forming one.

    S_out G_b S_in^T (arXiv 2405.13954, 2505.18976), or the TensorSketch of G_b; docs/method.md section 5.

    Args:
        x: layer inputs of all samples, packed, [N, I], float32 | bfloat16 | float16 | float64.
        dy: loss gradients at the layer's output, [N, O], same dtype and device.
        offsets: first row of each sample and N at the end, [B + 1], int64.
        dims: (k_out, k_in); one k for `tensorsketch`, and for the others if both sides are to have it.
        kind: `factored` (Gaussian sides), `factored-sjlt` (sparse sides) or `tensorsketch`.
        seed: the map's seed, in [0, 2^63).

    Returns:
        [B, k_out * k_in] (row-major, k_out slowest), or [B, k] for `tensorsketch`; float32 (float64 for float64), in
        loss per unit of weight; not differentiable.

    Raises:
        ShapeError: if N differs, offsets do not run from 0 to N, dims or seed are out of range, or `kind` is unknown.
        DtypeError: if an argument is no array, or dtypes differ or are not floating.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    sides = [as_integer(dim, "dims") for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
    if kind in SIDES and len(sides) == 1:
        sides *= 2
    seed = as_integer(seed, "seed")
    return _op(as_tensor(x, "x"), as_tensor(dy, "dy"), as_tensor(offsets, "offsets"), sides, kind, seed)


def _check(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seed: int) -> int:
    """Numbers a sample becomes, after the checks that read no values."""
    check_ragged(x, dy, offsets)
    if kind not in KINDS:
        raise ShapeError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if len(dims) != (1 if kind == "tensorsketch" else 2):
        raise ShapeError(f"dims must be (k_out, k_in), or one k for tensorsketch; got {dims} for {kind}")
    if min(dims) < 1 or math.prod(dims) > LARGEST_DIM:
        raise ShapeError(f"dims must be at least 1 and their product at most 2^30; got {dims}")
    if seed < 0:
        raise ShapeError(f"seed must be in [0, 2^63); got {seed}")
    return math.prod(dims)


def sides_of(kind: str, seed: int, dims: list[int]) -> list[tuple[int, str, int, int]]:
    """What `sketch` is given for dy and for x: (dim, kind, seed, nonzeros)."""
    seeds = tensor_seed(seed, "out"), tensor_seed(seed, "in")
    return [(k, SIDES[kind], one, math.gcd(k, NONZEROS)) for k, one in zip(dims, seeds, strict=True)]


def _matrix(width: int, dim: int, kind: str, seed: int, nonzeros: int) -> Tensor:
    """One side's projection, [width, dim], float64, entry by entry from the seed law; for the reference."""
    coordinate = torch.arange(width)
    if kind == "gaussian":
        return normal(seed, kind, coordinate[:, None], torch.arange(dim)) / math.sqrt(dim)
    law = BlockMap.of(kind, seed, dim, nonzeros)
    matrix = torch.zeros(width, dim, dtype=torch.float64)
    for chunk in range(law.chunks):
        bins, bits = law.place(coordinate, chunk)
        matrix[coordinate, bins] = (1 - 2 * bits).double() * law.scale
    return matrix


def _reference(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seed: int) -> Tensor:
    """The definition: G_b formed, then its sketch, in float64; the oracle of the tests. [B, k], float64."""
    results = torch.zeros(offsets.shape[0] - 1, math.prod(dims), dtype=torch.float64)
    for sample, (begin, end) in enumerate(pairwise(offsets.tolist())):
        gradient = (dy[begin:end].double().T @ x[begin:end].double()).cpu()
        if kind == "tensorsketch":
            (rows, row_signs), (columns, column_signs) = (
                tensorsketch_side(width, dims[0], seed, side) for side, width in enumerate(gradient.shape)
            )
            bins = (rows[:, None] + columns) % dims[0]
            signed = gradient * row_signs[:, None] * column_signs
            results[sample].index_add_(0, bins.flatten(), signed.flatten())
        else:
            left, right = (
                _matrix(n, *side) for n, side in zip(gradient.shape, sides_of(kind, seed, dims), strict=True)
            )
            results[sample] = (left.T @ gradient @ right).flatten()
    return results


def tensorsketch_side(width: int, dim: int, seed: int, side: int) -> tuple[Tensor, Tensor]:
    """Bins and signs of one side of a TensorSketch: of dy (side 0) or x (side 1).

    Every coordinate gets a bin of its own hash. The rotated blocks of `sketch` would not do here: bins of two sides
    add, and within a block i + o' and i' + o meet with certainty where i - i' = o - o'.

    Returns:
        [width] int64 in [0, dim), and [width] int64, +1 or -1.
    """
    coordinate = torch.arange(width)
    bins = below(cell(keys(seed, "tensorsketch", START, side), coordinate, 0), dim)
    return bins, 1 - 2 * negative(keys(seed, "tensorsketch", SIGN, side), coordinate, 0)


class _Scatter:
    """One side of a TensorSketch for rows of a matrix: bins filled one coordinate each at a time, so never two at once
    (an `index_add_` on CUDA adds in an order of its own).
    """

    def __init__(self, width: int, dim: int, seed: int, side: int, device: torch.device) -> None:
        bins, signs = tensorsketch_side(width, dim, seed, side)
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


def sample_groups(bounds: list[int], step: int) -> Iterator[tuple[int, int]]:
    """Runs of samples [first, last) of at most `step` rows together, or one longer sample."""
    first = 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= step:
            last += 1
        yield first, last
        first = last


def _torch(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seed: int) -> Tensor:
    """Rows sketched in blocks (those of `factored*` by whatever runs `sketch`), then a product a sample; any device."""
    bounds = offsets.tolist()
    samples, dtype = len(bounds) - 1, accumulation_dtype(x.dtype)
    folded = kind == "tensorsketch"
    if folded:
        sides = [_Scatter(part.shape[1], dims[0], seed, side, x.device) for side, part in enumerate((dy, x))]
        width, dtype = dims[0] // 2 + 1, dtype.to_complex()
    else:
        sides = [partial(_sketched, of=of) for of in sides_of(kind, seed, dims)]
        width = math.prod(dims)
    sums = torch.zeros(samples, width, dtype=dtype, device=x.device)
    step = max(1, BLOCK_ENTRIES // sum(dims))
    with ieee_products():
        for first, last in sample_groups(bounds, step):
            # A block never ends inside a sample that shares it, so a sample's bits do not depend on its neighbours.
            for begin in range(bounds[first], bounds[last], step):
                end = min(begin + step, bounds[last])
                left, right = (side(part[begin:end]) for side, part in zip(sides, (dy, x), strict=True))
                if folded:
                    left = torch.fft.rfft(left).mul_(torch.fft.rfft(right))
                for sample in range(first, last):
                    rows = slice(max(bounds[sample] - begin, 0), max(bounds[sample + 1] - begin, 0))
                    own = left[rows].sum(0) if folded else product_by_entry(left[rows].T, right[rows]).flatten()
                    sums[sample] += own
    if not folded:
        return sums
    # The library of the CPU's FFT refuses an empty batch.
    return torch.fft.irfft(sums, n=dims[0]) if samples else sums.real.new_zeros(0, dims[0])


def _sketched(rows: Tensor, of: tuple[int, str, int, int]) -> Tensor:
    dim, kind, seed, nonzeros = of
    return sketch(rows, dim, kind, seed, nonzeros=nonzeros)


@torch.library.custom_op("fillm_kernels::factored_sketch", mutates_args=())
def _op(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seed: int) -> Tensor:
    _check(x, dy, offsets, dims, kind, seed)
    host = check_offsets(offsets, x.shape[0])
    result = select("factored_sketch", x.device, x.dtype)(x.detach(), dy.detach(), host, dims, kind, seed)
    return result.to(device=x.device, dtype=accumulation_dtype(x.dtype))


@_op.register_fake
def _(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seed: int) -> Tensor:
    numbers = _check(x, dy, offsets, dims, kind, seed)
    return x.new_empty(offsets.shape[0] - 1, numbers, dtype=accumulation_dtype(x.dtype))


register(
    "factored_sketch",
    cpu=Backend(_torch, devices=("cpu",), needs_extension=True),
    triton=triton_backend("factored_sketch"),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
