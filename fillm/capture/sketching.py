"""Sketches of per-sample gradients: one linear map a tensor, the same whatever form its gradients are held in.

`E <S g, S h> = <g, h>` (docs/method.md section 5). Factored gradients are sketched from their factors; an embedding's
from the rows that a sample touches. The maps are functions of (seed, tensor, coordinate), docs/seed-law.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import fillm_kernels as fk
import torch
from fillm_kernels.products import ieee_products
from fillm_kernels.seed_law import BlockMap, tensor_seed
from torch import Tensor

from fillm.capture.segments import add_rows_
from fillm.errors import UsageError

ONE_SIDED = ("oporp", "countsketch", "sjlt", "gaussian", "rademacher")
# Two-sided kinds, and what takes their place for tensors that have one side alone.
TWO_SIDED = {"factored": "gaussian", "factored-sjlt": "sjlt", "tensorsketch": "countsketch"}
KINDS = (*ONE_SIDED, *TWO_SIDED)
DENSE = ("gaussian", "rademacher")
NONZEROS = 4  # bins a coordinate of sjlt goes into, where that divides the dimension
LARGEST_DIM = 1 << 30
MOST_LOPSIDED = 4  # times that one side of a factored sketch may be as wide as the other
HALVES = ("a", "b")
BLOCK_ENTRIES = 1 << 20  # entries that are placed in their bins at a time
SKETCH_ENTRIES = 1 << 22  # entries of the dense sketches of single rows that are held at a time: 16 MiB in float32
Place = Callable[[Tensor], list[tuple[Tensor, Tensor]]]  # ids [U] -> bins and signs [U, H], once for every nonzero


@dataclass(frozen=True)
class SketchMap:
    """The linear map of one tensor's gradients to `dim` numbers.

    Attributes:
        kind: one of `KINDS`, or `exact`: the gradient itself, of a tensor of at most as many entries as were asked for.
        dim: numbers a gradient becomes.
        shape: of the tensor.
        seed: of the tensor.
        halves: 1, or 2 where the numbers are two independent sketches of `dim / 2` each, one after the other, both
            times `1/sqrt(2)`, so that inner products are the mean of two. How far the halves differ says how good a
            two-sided sketch is, for which no simple bound holds.
    """

    kind: str
    dim: int
    shape: tuple[int, ...]
    seed: int
    halves: int = 1

    @classmethod
    def of(cls, kind: str, dim: int, name: str, shape: Sequence[int], seed: int) -> "SketchMap":
        """The map of a tensor.

        Args:
            kind: one of `KINDS`. Tensors of fewer than two dimensions take the one-sided sketch of the family.
            dim: numbers a gradient may become; smaller tensors stay as they are.
            name: the tensor's, as in `named_parameters()`.
            shape: the tensor's.
            seed: the run's.

        Raises:
            UsageError: if there is no such kind or no such dimension of it.
        """
        check_sketch(kind, dim)
        shape, own = tuple(shape), tensor_seed(seed, name)
        if math.prod(shape) <= dim:
            return cls("exact", math.prod(shape), shape, own)
        if kind in TWO_SIDED and len(shape) < 2:
            kind = TWO_SIDED[kind]
        return cls(kind, dim, shape, own, len(HALVES) if kind in TWO_SIDED else 1)

    @property
    def nonzeros(self) -> int:
        """Bins a coordinate of a one-sided `sjlt` goes into."""
        return math.gcd(self.dim, NONZEROS)

    @property
    def half_dims(self) -> tuple[int, ...]:
        """What `factored_sketch` takes for one half: (k_out, k_in), or (k,) of `tensorsketch`."""
        half = self.dim // self.halves
        return (half,) if self.kind == "tensorsketch" else nearest_to_square(half)

    def half_seeds(self) -> list[int]:
        """The seeds of the halves."""
        return [tensor_seed(self.seed, half) for half in HALVES]

    def slice(self, index: int) -> "SketchMap":
        """The map of one slice `[index]` of a stack: a stack's sketch is the sum of its slices' own."""
        return replace(self, shape=self.shape[1:], seed=tensor_seed(self.seed, str(index)))


def nearest_to_square(dim: int) -> tuple[int, int]:
    """The two factors of `dim` that differ least, the smaller first."""
    smaller = next(k for k in range(math.isqrt(dim), 0, -1) if dim % k == 0)
    return smaller, dim // smaller


def check_sketch(kind: str, dim: int) -> None:
    """Refuses with a `UsageError` a kind or a dimension for which there is no map."""
    if kind not in KINDS:
        raise UsageError(f"there is no compression {kind!r}; there are {', '.join(KINDS)}")
    if not 1 <= dim <= LARGEST_DIM:
        raise UsageError(f"a sketch has from 1 to 2^30 numbers; got {dim}")
    if kind in TWO_SIDED and dim % len(HALVES):
        raise UsageError(f"a {kind} sketch is two halves, so its size must be even; got {dim}")
    if kind in TWO_SIDED and kind != "tensorsketch":
        k_out, k_in = nearest_to_square(dim // len(HALVES))
        if k_in > MOST_LOPSIDED * k_out:
            powers = 1 << dim.bit_length() - 1, 1 << dim.bit_length()
            side = max(1, round(math.sqrt(dim / 2)))
            good = ", ".join(str(size) for size in sorted({*powers, 2 * side * side}))
            raise UsageError(
                f"half of a {kind} sketch of {dim} would be {k_out} x {k_in}; take a size whose half has two factors "
                f"near each other, such as {good}"
            )


class HasSamples(Protocol):
    """What `flattened` asks of gradients."""

    def materialise(self, sample: int) -> Tensor:
        """The gradient of one sample."""
        ...


def flattened(gradients: HasSamples, count: int) -> Tensor:
    """The gradients themselves, [B, numel], at least float32: of small tensors only."""
    formed = torch.stack([gradients.materialise(sample).flatten() for sample in range(count)])
    return formed.to(torch.promote_types(formed.dtype, torch.float32))


def sketch_outer(x: Tensor, dy: Tensor, offsets: Tensor, to: SketchMap) -> Tensor:
    """Sketches of `G_b = dy_b^T x_b`: x [N, I], dy [N, O], offsets [B + 1] -> [B, dim]."""
    if to.kind in TWO_SIDED:
        return fk.factored_sketch(x, dy, offsets, to.half_dims, to.kind, to.half_seeds()) / math.sqrt(to.halves)
    return fk.outer_sketch(x, dy, offsets, to.dim, to.kind, to.seed, nonzeros=to.nonzeros)


def sketch_dense(values: Tensor, to: SketchMap) -> Tensor:
    """Sketches of gradients held outright: [B, *shape] -> [B, dim]."""
    count = values.shape[0]
    if to.kind == "exact":
        return values.reshape(count, -1).to(torch.promote_types(values.dtype, torch.float32))
    if len(to.shape) > 2:
        return torch.stack([sketch_dense(values[:, index], to.slice(index)) for index in range(to.shape[0])]).sum(0)
    if to.kind in TWO_SIDED:  # a matrix is its rows at their places
        samples, ids = (torch.arange(size, device=values.device) for size in values.shape[:2])
        return sketch_lookup(
            samples.repeat_interleave(ids.numel()), ids.repeat(count), values.reshape(-1, values.shape[2]), count, to
        )
    return fk.sketch(values.reshape(count, -1), to.dim, to.kind, to.seed, nonzeros=to.nonzeros)


def sketch_lookup(samples: Tensor, ids: Tensor, rows: Tensor, count: int, to: SketchMap) -> Tensor:
    """Sketches of matrices of which some rows are given and the others are zero.

    Args:
        samples: [U], the sample that a row belongs to, in ascending order.
        ids: [U], the matrix's row.
        rows: [U, H], its entries; rows of one place add up.
        count: B.
        to: the map, of a matrix [V, H].

    Returns:
        [B, dim].
    """
    if to.kind in DENSE:
        return _projected(samples, ids, rows, count, to)
    if to.kind in ONE_SIDED:
        return _placed(samples, ids, rows, count, to)
    if to.kind == "tensorsketch":
        halves = [_folded(samples, ids, rows, count, to.dim // to.halves, seed) for seed in to.half_seeds()]
    else:
        bounds = torch.searchsorted(samples, torch.arange(count + 1, device=samples.device)).tolist()
        halves = [_two_sided(bounds, ids, rows, to, seed) for seed in to.half_seeds()]
    return torch.cat(halves, 1) / math.sqrt(to.halves)


def _projected(samples: Tensor, ids: Tensor, rows: Tensor, count: int, to: SketchMap) -> Tensor:
    """A dense sketch, the rows of one place next to each other: every entry of the map is made once for all samples."""
    out = torch.zeros(count, to.dim, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    for some in ids.argsort(stable=True).split(max(1, SKETCH_ENTRIES // to.dim)):
        part = fk.sketch(rows[some], to.dim, to.kind, to.seed, offset=ids[some] * rows.shape[1])
        add_rows_(out, samples[some], part)
    return out


def _placed(samples: Tensor, ids: Tensor, rows: Tensor, count: int, to: SketchMap) -> Tensor:
    """A sparse one-sided sketch, entry by entry of the rows given."""
    law = BlockMap.of(to.kind, to.seed, to.dim, to.nonzeros)
    column = torch.arange(rows.shape[1], device=rows.device)

    def place(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        coordinate = ids[:, None] * rows.shape[1] + column
        placed = (law.place(coordinate, chunk) for chunk in range(law.chunks))
        return [(bins, 1 - 2 * bits) for bins, bits in placed]

    return _scattered(samples, ids, rows, count, to.dim, place) * law.scale


def _folded(samples: Tensor, ids: Tensor, rows: Tensor, count: int, dim: int, seed: int) -> Tensor:
    """A TensorSketch: entry (v, h) falls on the sum of its row's and its column's bin."""
    column_bins, column_signs = fk.tensorsketch_side(torch.arange(rows.shape[1], device=rows.device), dim, seed, "in")

    def place(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        bins, signs = fk.tensorsketch_side(ids, dim, seed, "out")
        return [((bins[:, None] + column_bins) % dim, signs[:, None] * column_signs)]

    return _scattered(samples, ids, rows, count, dim, place)


def _scattered(samples: Tensor, ids: Tensor, rows: Tensor, count: int, dim: int, place: Place) -> Tensor:
    """[B, dim] of sums of entries at the bins and with the signs that `place` gives for some rows."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(count * dim, dtype=wide, device=rows.device)
    step = max(1, BLOCK_ENTRIES // max(1, rows.shape[1]))
    for begin in range(0, ids.numel(), step):
        block = slice(begin, begin + step)
        for bins, signs in place(ids[block]):
            add_rows_(out, (samples[block, None] * dim + bins).flatten(), (rows[block].to(wide) * signs).flatten())
    return out.view(count, dim)


def _two_sided(bounds: list[int], ids: Tensor, rows: Tensor, to: SketchMap, seed: int) -> Tensor:
    """One half of a factored sketch: rows of the map of dy in place of sketched one-hot vectors."""
    right = fk.side_sketch(rows, "in", to.half_dims, to.kind, seed)
    left = fk.side_rows(ids, "out", to.half_dims, to.kind, seed, dtype=right.dtype)
    with ieee_products():
        products = [left[begin:end].T @ right[begin:end] for begin, end in pairwise(bounds)]
    return torch.stack(products).flatten(1)
