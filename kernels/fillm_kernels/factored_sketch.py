"""`factored_sketch`: per-sample weight gradients sketched from both sides, never formed.

    S_out G_b S_in^T = sum_t (S_out dy_t)(S_in x_t)^T                 LoGra, arXiv 2405.13954; GraSS, arXiv 2505.18976
    TS(G_b) = sum_t C_out dy_t * C_in x_t   (* circular convolution)  TensorSketch, Pham and Pagh, KDD 2013

The rows of x and dy are sketched first, N (k_out + k_in) numbers a block of rows at a time, and multiplied sample by
sample. E <S G, S H> = <G, H>; docs/method.md section 5, docs/kernels/factored_sketch.md.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import accumulation_dtype, as_integer, as_tensor, check_offsets, check_ragged
from fillm_kernels.dispatch import Backend, register, select, triton_backend
from fillm_kernels.errors import ShapeError
from fillm_kernels.products import ieee_products, product_by_entry
from fillm_kernels.seed_law import KINDS as SEED_LAW_KINDS
from fillm_kernels.sides import (
    SIDES,
    SKETCH_OF_A_SIDE,
    CountSketch,
    checked_dims,
    listed,
    projection_rows,
    sides_of,
    tensorsketch_side,
)
from fillm_kernels.sketch import sketch
from fillm_kernels.tensorsketch import count_sketch, from_gradients, is_cheaper_formed

BLOCK_ENTRIES = 1 << 21  # entries of the sketched rows held at a time


def factored_sketch(
    x: Tensor | Any,
    dy: Tensor | Any,
    offsets: Tensor | Any,
    dims: int | Sequence[int],
    kind: str = "factored",
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Sketch every per-sample weight gradient G_b = dy_b^T x_b from both sides, without forming one.

    S_out G_b S_in^T (arXiv 2405.13954, 2505.18976), or the TensorSketch of G_b; docs/method.md section 5.

    Args:
        x: layer inputs of all samples, packed, [N, I], float32 | bfloat16 | float16 | float64.
        dy: loss gradients at the layer's output, [N, O], same dtype and device.
        offsets: first row of each sample and N at the end, [B + 1], int64.
        dims: (k_out, k_in); one k for `tensorsketch`, and for the others if both sides are to have it.
        kind: `factored` (Gaussian sides), `factored-sjlt` (sparse sides) or `tensorsketch`.
        seed: the map's seed, in [0, 2^63), or the seeds of several maps, whose sketches come side by side.

    Returns:
        [B, k_out * k_in] (row-major, k_out slowest), or [B, k] for `tensorsketch`, as often as there are seeds; float32
        (float64 for float64), in loss per unit of weight; not differentiable.

    Raises:
        ShapeError: if N differs, offsets do not run from 0 to N, dims or seed are out of range, or `kind` is unknown.
        DtypeError: if an argument is no array, or dtypes differ or are not floating.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    seeds = [as_integer(one, "seed") for one in (seed if isinstance(seed, (list, tuple)) else [seed])]
    arrays = as_tensor(x, "x"), as_tensor(dy, "dy"), as_tensor(offsets, "offsets")
    return _op(*arrays, listed(dims, kind), kind, seeds)


def _check(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seeds: list[int]) -> int:
    """Numbers a sample becomes, after the checks that read no values."""
    check_ragged(x, dy, offsets)
    if not seeds:
        raise ShapeError("seed must be one seed or several; got none")
    return sum(math.prod(checked_dims(dims, kind, seed)) for seed in seeds)


def _reference(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seed: int) -> Tensor:
    """The definition: G_b formed, then its sketch, in float64; the oracle of the tests. [B, k], float64."""
    results = torch.zeros(offsets.shape[0] - 1, math.prod(dims), dtype=torch.float64)
    for sample, (begin, end) in enumerate(pairwise(offsets.tolist())):
        gradient = (dy[begin:end].double().T @ x[begin:end].double()).cpu()
        if kind == "tensorsketch":
            (rows, row_signs), (columns, column_signs) = (
                tensorsketch_side(torch.arange(width), dims[0], seed, side)
                for side, width in zip(SIDES, gradient.shape, strict=True)
            )
            bins = (rows[:, None] + columns) % dims[0]
            signed = gradient * row_signs[:, None] * column_signs
            results[sample].index_add_(0, bins.flatten(), signed.flatten())
        else:
            left, right = (
                projection_rows(torch.arange(n), *side)
                for n, side in zip(gradient.shape, sides_of(kind, seed, dims), strict=True)
            )
            results[sample] = (left.T @ gradient @ right).flatten()
    return results


def sample_groups(bounds: list[int], step: int) -> Iterator[tuple[int, int]]:
    """Runs of samples [first, last) of at most `step` rows together, or one longer sample."""
    first = 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= step:
            last += 1
        yield first, last
        first = last


Side = Callable[[Tensor], Tensor]  # rows [n, width] -> [n, k], float32 or float64


def _torch(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seed: int) -> Tensor:
    """Rows sketched in blocks (those of `factored*` by whatever runs `sketch`), then a product a sample; any device."""
    if kind != "tensorsketch":
        return _multiplied(x, dy, offsets, dims, [partial(_sketched, of=of) for of in sides_of(kind, seed, dims)])
    sides = [
        CountSketch(part.shape[1], dims[0], seed, side, x.device) for side, part in zip(SIDES, (dy, x), strict=True)
    ]
    return _multiplied(x, dy, offsets, dims, sides, folded=True)


def _multiplied(
    x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], sides: Sequence[Side], *, folded: bool = False
) -> Tensor:
    """What the sides (of dy, of x) make of the rows, multiplied sample by sample: as spectra if `folded`."""
    bounds = offsets.tolist()
    samples, dtype = len(bounds) - 1, accumulation_dtype(x.dtype)
    width, dtype = (dims[0] // 2 + 1, dtype.to_complex()) if folded else (math.prod(dims), dtype)
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


Run = Callable[[Tensor, Tensor, Tensor, list[int], str, int], Tensor]


def for_each_seed(run: Run) -> Callable[[Tensor, Tensor, Tensor, list[int], str, list[int]], Tensor]:
    """A backend that knows one map, one map after the other."""

    def runs(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seeds: list[int]) -> Tensor:
        return torch.cat([run(x, dy, offsets, dims, kind, seed) for seed in seeds], 1)

    return runs


def _cpu(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    dims: list[int],
    kind: str,
    seeds: list[int],
    instruction_set: str = "",
) -> Tensor:
    """C++ (csrc/cpu/factored_sketch.cpp, tensorsketch.cpp), all maps in one visit of x and dy."""
    x, dy = (part if part.stride(1) == 1 or part.shape[1] <= 1 else part.contiguous() for part in (x, dy))
    if kind == "tensorsketch":
        return _tensorsketch(x, dy, offsets, dims[0], seeds, instruction_set)
    out = torch.empty(offsets.shape[0] - 1, len(seeds) * math.prod(dims), dtype=accumulation_dtype(x.dtype))
    sides = list(zip(*(sides_of(kind, seed, dims) for seed in seeds), strict=True))  # by side, then by seed
    native.extension.factored_sketch(
        **{
            name: (part.data_ptr(), part.stride(0), part.shape[1], maps[0][0], maps[0][3], [one[2] for one in maps])
            for name, part, maps in zip(("dy", "x"), (dy, x), sides, strict=True)
        },
        offsets=offsets.data_ptr(),
        samples=out.shape[0],
        kind=SEED_LAW_KINDS.index(SKETCH_OF_A_SIDE[kind]),
        out=out.data_ptr(),
        dtype=native.address(x)[-1],
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    return out


def _tensorsketch(x: Tensor, dy: Tensor, offsets: Tensor, dim: int, seeds: list[int], instruction_set: str) -> Tensor:
    """Every sample in the cheaper of two ways. [B, maps * k]."""
    lengths = offsets.diff()
    formed = is_cheaper_formed(lengths, x.shape[1], dy.shape[1], dim, len(seeds))
    out = torch.empty(lengths.shape[0], len(seeds) * dim, dtype=accumulation_dtype(x.dtype))
    for chosen, run in ((formed, from_gradients), (~formed, _from_spectra)):
        if chosen.all():
            return run(x, dy, offsets, dim, seeds, instruction_set)
        rows = chosen.repeat_interleave(lengths)
        own = torch.nn.functional.pad(lengths[chosen].cumsum(0), (1, 0))
        out[chosen] = run(x[rows], dy[rows], own, dim, seeds, instruction_set)
    return out


def _from_spectra(x: Tensor, dy: Tensor, offsets: Tensor, dim: int, seeds: list[int], instruction_set: str) -> Tensor:
    """`from_gradients`, by the transforms of every token's count sketches."""
    count = partial(count_sketch, dim=dim, instruction_set=instruction_set)
    maps = [
        _multiplied(x, dy, offsets, [dim], [partial(count, seed=seed, side=n) for n in range(2)], folded=True)
        for seed in seeds
    ]
    return torch.cat(maps, 1)


@torch.library.custom_op("fillm_kernels::factored_sketch", mutates_args=())
def _op(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seeds: list[int]) -> Tensor:
    _check(x, dy, offsets, dims, kind, seeds)
    host = check_offsets(offsets, x.shape[0])
    result = select("factored_sketch", x.device, x.dtype)(x.detach(), dy.detach(), host, dims, kind, seeds)
    return result.to(device=x.device, dtype=accumulation_dtype(x.dtype))


@_op.register_fake
def _(x: Tensor, dy: Tensor, offsets: Tensor, dims: list[int], kind: str, seeds: list[int]) -> Tensor:
    numbers = _check(x, dy, offsets, dims, kind, seeds)
    return x.new_empty(offsets.shape[0] - 1, numbers, dtype=accumulation_dtype(x.dtype))


register(
    "factored_sketch",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("factored_sketch"),
    torch=Backend(for_each_seed(_torch)),
    reference=Backend(for_each_seed(_reference)),
)
