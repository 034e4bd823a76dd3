"""Per-sample gradients of one tensor for one batch, kept in factored form.

A linear layer's per-sample gradient `G_b = dy_b^T x_b` is never formed: its norm, its dot with a tensor and its
weighted sum follow from `x` and `dy` (docs/method.md (4) to (6)). Every class here answers the same questions, so that
the statistics need not know which layer they look at. Sample `b` owns rows `offsets[b] .. offsets[b + 1]`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import fillm_kernels as fk
import torch
from fillm_kernels.products import ieee_products, linear, product
from torch import Tensor

from fillm.capture.segments import add_rows_, sample_of_row, segment_sum
from fillm.capture.sketching import SketchMap, flattened, sketch_dense, sketch_lookup, sketch_outer

LEAST_FUSED_TOKENS = 96  # a sample; on Zen 5 layers of 256 to 1024 features break even at about 60, 128 gain a fifth


class PerSampleGradients(Protocol):
    """Gradients of `B` samples' own losses with respect to one tensor of shape `shape`."""

    shape: torch.Size

    def squared_norms(self) -> Tensor:
        """`q_b = |g_b|^2`, [B], float64."""
        ...

    def dots(self, v: Tensor) -> Tensor:
        """`d_b = <g_b, v>` for `v` of the tensor's shape, [B], float64."""
        ...

    def add_weighted_(self, out: Tensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """`out += alpha * sum_b weights[b] g_b`; `weights=None` means all ones."""
        ...

    def add_powers_(self, out: Tensor, power: int, alpha: float = 1.0) -> None:
        """`out += alpha * sum_b |g_b|^power` entry by entry, `power` 1 or 2: samples do not cancel."""
        ...

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """`<g_b, u>` separately for every row (`axis` 0: all leading dimensions, flattened) or column (`axis` 1).

        Returns:
            [B, rows] or [B, columns], float64; a vector's rows are its entries.
        """
        ...

    def sketches(self, to: SketchMap) -> Tensor:
        """Every gradient in `to.dim` numbers, [B, dim], float32 (float64 for float64 gradients).

        Linear in the gradient, and the same map whichever class holds it.
        """
        ...

    def materialise(self, sample: int) -> Tensor:
        """The gradient of one sample, of the tensor's shape: for checks and element-level squares only."""
        ...

    def leading_rows(self, begin: int, end: int) -> Tensor:
        """Rows `begin .. end` of every sample's gradient as a matrix of `row_layout(shape)`.

        Returns:
            [B, end - begin, columns], float32 (float64 where gradients are float64): formed anew, to be dropped soon.
        """
        ...

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "PerSampleGradients":
        """The same kind of gradients from `change(t)` for every tensor `t` that is held and grows with the batch."""
        ...


def row_layout(shape: torch.Size) -> tuple[int, int]:
    """(rows, columns) of a tensor as a matrix: leading dimensions flattened; a vector's rows are its entries."""
    return (shape[:-1].numel(), shape[-1]) if len(shape) > 1 else (shape.numel(), 1)


def padded_rows(rows: Tensor, offsets: Tensor) -> Tensor:
    """Each sample's rows, with zero rows up to the longest: [N, W] -> [B, longest, W]; a view where all are equal."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    if rows.shape[0] == longest * lengths.numel():
        return rows.reshape(lengths.numel(), longest, rows.shape[1])
    place = offsets[:-1, None] + torch.arange(longest, device=offsets.device)  # [B, longest]
    beyond = place >= offsets[1:, None]
    return rows[place.masked_fill(beyond, 0)].masked_fill(beyond[:, :, None], 0.0)


class OuterGradients:
    """`G_b = dy_b^T x_b`, [O, I]; with `transposed`, the tensor is stored as its transpose [I, O] (GPT-2's Conv1D)."""

    def __init__(self, x: Tensor, dy: Tensor, offsets: Tensor, transposed: bool = False) -> None:
        self.x, self.dy, self.offsets = (dy, x, offsets) if transposed else (x, dy, offsets)  # [N, I], [N, O], [B + 1]
        self.shape = torch.Size((self.dy.shape[1], self.x.shape[1]))

    def squared_norms(self) -> Tensor:
        """Equation (4) of docs/method.md."""
        return fk.ghost_norm(self.x, self.dy, self.offsets).double()

    def dots(self, v: Tensor) -> Tensor:
        """Equation (5) of docs/method.md."""
        return fk.ghost_dot(self.x, self.dy, v, self.offsets).double()

    def add_weighted_(self, out: Tensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """Equation (6) of docs/method.md."""
        if weights is not None:
            weights = weights.to(torch.float64 if self.x.dtype == torch.float64 else torch.float32)
        fk.weighted_outer_(out, self.x, self.dy, weights, self.offsets, alpha=alpha)

    def add_powers_(self, out: Tensor, power: int, alpha: float = 1.0) -> None:
        """From tiles of `G_b`, none of which is kept."""
        asked = {"second" if power == 2 else "absolute": out}
        fk.sample_moments(self.x, self.dy, self.offsets, alpha=alpha, **asked)

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """Row `o` of `G_b` dot row `o` of `u` is `sum_t dy[t, o] (x_t . u_o)`; columns with the roles changed."""
        x, dy = self.x.to(u.dtype), self.dy.to(u.dtype)
        product = (x @ u.T) * dy if axis == 0 else (dy @ u) * x
        return segment_sum(product, self.offsets).double()

    def sketches(self, to: SketchMap) -> Tensor:
        """From the factors; `G_b` is never in memory."""
        if to.kind == "exact":
            return flattened(self, self.offsets.numel() - 1)
        return sketch_outer(self.x, self.dy, self.offsets, to)

    def materialise(self, sample: int) -> Tensor:
        """`dy_b^T x_b`."""
        rows = slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        return self.dy[rows].to(dtype).T @ self.x[rows].to(dtype)

    def leading_rows(self, begin: int, end: int) -> Tensor:
        """`dy_b[:, begin:end]^T x_b`."""
        dy = self.dy[:, begin:end]
        with ieee_products():
            if self.x.is_cuda:  # one launch for all samples
                return product(padded_rows(dy, self.offsets).transpose(1, 2), padded_rows(self.x, self.offsets))
            dtype = torch.promote_types(self.x.dtype, torch.float32)
            dy, x = dy.to(dtype), self.x.to(dtype)
            out = x.new_empty(self.offsets.numel() - 1, dy.shape[1], x.shape[1])
            for b, (first, last) in enumerate(pairwise(self.offsets.tolist())):
                out[b] = linear(dy[first:last].T, x[first:last].T)
        return out

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "OuterGradients":
        """Of `x` and `dy`."""
        return OuterGradients(change(self.x), change(self.dy), self.offsets)


def norms_and_dots(gradients: PerSampleGradients, v: Tensor) -> tuple[Tensor, Tensor]:
    """`q_b` and `d_b` together, [B] each, float64; from one visit of each tile of `G_b` where that is the cheaper way.

    The tiles cost what (5) costs and give (4) for nothing, but short samples leave them half empty.
    """
    if (together := getattr(gradients, "norms_and_dots", None)) is not None:  # with `v` brought in once for both
        return together(v)
    if not isinstance(gradients, OuterGradients) or gradients.x.device.type != "cpu":
        return gradients.squared_norms(), gradients.dots(v)
    if gradients.x.shape[0] < LEAST_FUSED_TOKENS * (gradients.offsets.numel() - 1):
        return gradients.squared_norms(), gradients.dots(v)
    found = fk.sample_moments(gradients.x, gradients.dy, gradients.offsets, v)
    return found.squared_norms.double(), found.dots.double()


class LookupGradients:
    """An embedding: row `ids[t]` of the gradient receives `dy_t`. Equal ids of a sample add up before squaring."""

    def __init__(self, ids: Tensor, dy: Tensor, offsets: Tensor, num_rows: int) -> None:
        self.ids, self.dy, self.offsets = ids, dy, offsets  # [N], [N, H], [B + 1]
        self.shape = torch.Size((num_rows, dy.shape[1]))

    def grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sample, id and summed `dy` of every distinct (sample, id): [U], [U], [U, H]."""
        keys, inverse = torch.unique(sample_of_row(self.offsets) * self.shape[0] + self.ids, return_inverse=True)
        dtype = torch.promote_types(self.dy.dtype, torch.float32)
        rows = torch.zeros(keys.numel(), self.shape[1], dtype=dtype, device=self.dy.device)
        return keys // self.shape[0], keys % self.shape[0], add_rows_(rows, inverse, self.dy)

    def squared_norms(self) -> Tensor:
        """`sum over distinct ids |sum_t dy_t|^2`."""
        samples, _, rows = self.grouped()
        out = torch.zeros(self.offsets.numel() - 1, dtype=torch.float64, device=rows.device)
        return add_rows_(out, samples, rows.double().square().sum(1))

    def dots(self, v: Tensor) -> Tensor:
        """`sum_t <dy_t, v[id_t]>`."""
        return segment_sum((v[self.ids] * self.dy).sum(1, dtype=torch.float64), self.offsets)

    def add_weighted_(self, out: Tensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """Scatters the scaled rows."""
        rows = self.dy.to(out.dtype) * alpha
        if weights is not None:
            rows = rows * weights.to(out.dtype)[sample_of_row(self.offsets), None]
        add_rows_(out, self.ids, rows)

    def add_powers_(self, out: Tensor, power: int, alpha: float = 1.0) -> None:
        """Scatters the powers of each sample's summed rows."""
        _, ids, rows = self.grouped()
        add_rows_(out, ids, rows.abs().pow(power) * alpha)

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """Rows: dots gathered by (sample, id); columns: products summed over the sample's tokens."""
        product = (u[self.ids] * self.dy.to(u.dtype)).double()
        if axis == 1:
            return segment_sum(product, self.offsets)
        count = self.offsets.numel() - 1
        out = product.new_zeros(count * self.shape[0])
        add_rows_(out, sample_of_row(self.offsets) * self.shape[0] + self.ids, product.sum(1))
        return out.view(count, self.shape[0])

    def sketches(self, to: SketchMap) -> Tensor:
        """From the rows that a sample's tokens touch."""
        if to.kind == "exact":
            return flattened(self, self.offsets.numel() - 1)
        return sketch_lookup(*self.grouped(), self.offsets.numel() - 1, to)

    def materialise(self, sample: int) -> Tensor:
        """The dense gradient of one sample."""
        rows = slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))
        out = torch.zeros(self.shape, dtype=torch.promote_types(self.dy.dtype, torch.float32), device=self.dy.device)
        return add_rows_(out, self.ids[rows], self.dy[rows])

    def leading_rows(self, begin: int, end: int) -> Tensor:
        """Only tokens with an id in the range are read."""
        used = ((self.ids >= begin) & (self.ids < end)).nonzero().squeeze(1)
        count, height = self.offsets.numel() - 1, end - begin
        dtype = torch.promote_types(self.dy.dtype, torch.float32)
        out = torch.zeros(count * height, self.shape[1], dtype=dtype, device=self.dy.device)
        place = sample_of_row(self.offsets)[used] * height + self.ids[used] - begin
        return add_rows_(out, place, self.dy[used]).view(count, height, self.shape[1])

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "LookupGradients":
        """Of the ids and `dy`."""
        return LookupGradients(change(self.ids), change(self.dy), self.offsets, self.shape[0])


class DenseGradients:
    """Per-sample gradients held outright, `[B, *shape]`: norm weights, biases, and what the fallback computes."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = values.shape[1:]

    def squared_norms(self) -> Tensor:
        """Directly."""
        return self.values.reshape(self.values.shape[0], -1).double().square().sum(1)

    def dots(self, v: Tensor) -> Tensor:
        """Directly."""
        return self.values.reshape(self.values.shape[0], -1).double() @ v.flatten().double()

    def add_weighted_(self, out: Tensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """Directly."""
        values = self.values.double()
        if weights is not None:
            values = values * weights.double().view(-1, *[1] * (values.ndim - 1))
        out.add_(values.sum(0).to(out.dtype), alpha=alpha)

    def add_powers_(self, out: Tensor, power: int, alpha: float = 1.0) -> None:
        """Directly."""
        out.add_(self.values.double().abs().pow(power).sum(0).to(out.dtype), alpha=alpha)

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """Directly."""
        product = self.values.double() * u.double()
        if product.ndim < 3:
            return product.reshape(product.shape[0], -1)
        product = product.reshape(product.shape[0], -1, product.shape[-1])
        return product.sum(2 if axis == 0 else 1)

    def sketches(self, to: SketchMap) -> Tensor:
        """Directly."""
        return sketch_dense(self.values, to)

    def materialise(self, sample: int) -> Tensor:
        """One row."""
        return self.values[sample]

    def leading_rows(self, begin: int, end: int) -> Tensor:
        """A slice."""
        rows = self.values.reshape(self.values.shape[0], *row_layout(self.shape))[:, begin:end]
        return rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "DenseGradients":
        """Of the gradients."""
        return DenseGradients(change(self.values))
