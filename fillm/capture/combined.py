"""Per-sample gradients made of others: stacks of experts, several uses of one tensor, tied embedding and head."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fillm.capture.gradients import (
    DenseGradients,
    LookupGradients,
    OuterGradients,
    PerSampleGradients,
    row_layout,
)
from fillm.capture.segments import sample_of_row
from fillm.capture.sketching import SketchMap, flattened


class StackedGradients:
    """A stack of matrices `[E, ...]`, one per expert, of which a batch touches some; slices never overlap."""

    def __init__(self, slices: dict[int, PerSampleGradients], shape: torch.Size, num_samples: int) -> None:
        self.slices, self.shape, self.num_samples = slices, shape, num_samples

    def squared_norms(self) -> Tensor:
        """Norms of disjoint slices add."""
        return torch.stack([part.squared_norms() for part in self.slices.values()]).sum(0)

    def dots(self, v: Tensor) -> Tensor:
        """Dots of disjoint slices add."""
        return torch.stack([part.dots(v[index]) for index, part in self.slices.items()]).sum(0)

    def add_weighted_(self, out: Tensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """Slice by slice."""
        for index, part in self.slices.items():
            part.add_weighted_(out[index], weights, alpha)

    def add_powers_(self, out: Tensor, power: int, alpha: float = 1.0) -> None:
        """Slice by slice."""
        for index, part in self.slices.items():
            part.add_powers_(out[index], power, alpha)

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """Rows are (expert, row), flattened; a column is that column of every expert."""
        parts = {index: part.axis_dots(u[index], axis) for index, part in self.slices.items()}
        if axis == 1:
            return torch.stack(list(parts.values())).sum(0)
        rows = self.shape[1] if len(self.shape) > 2 else self.shape[-1]
        out = torch.zeros(self.num_samples, self.shape[0], rows, dtype=torch.float64, device=u.device)
        for index, part in parts.items():
            out[:, index] = part
        return out.flatten(1) if len(self.shape) > 2 else out.sum(2)

    def sketches(self, to: SketchMap) -> Tensor:
        """Sums of the slices' sketches; a stack of vectors is the matrix of which it holds some rows."""
        if to.kind == "exact":
            return flattened(self, self.num_samples)
        if len(self.shape) > 2:
            return torch.stack([part.sketches(to.slice(index)) for index, part in self.slices.items()]).sum(0)
        rows = torch.stack([flattened(part, self.num_samples) for part in self.slices.values()], 1)  # [B, slices, O]
        ids = torch.tensor(list(self.slices), device=rows.device).repeat(self.num_samples)
        offsets = torch.arange(self.num_samples + 1, device=rows.device) * len(self.slices)
        return LookupGradients(ids, rows.flatten(0, 1), offsets, self.shape[0]).sketches(to)

    def materialise(self, sample: int) -> Tensor:
        """The dense gradient of one sample."""
        parts = {index: part.materialise(sample) for index, part in self.slices.items()}
        out = next(iter(parts.values())).new_zeros(self.shape)
        for index, part in parts.items():
            out[index] = part
        return out

    def leading_rows(self, begin: int, end: int) -> Tensor:
        """From the slices that the range meets; of a stack of vectors a row is a whole slice."""
        height, columns = row_layout(self.shape)[0] // self.shape[0], row_layout(self.shape)[1]
        empty = next(iter(self.slices.values())).leading_rows(0, 0)
        out = empty.new_zeros(self.num_samples, end - begin, columns)
        for index, part in self.slices.items():
            top = index * height
            first, last = max(begin, top), min(end, top + height)
            if first >= last:
                continue
            if len(self.shape) > 2:
                out[:, first - begin : last - begin] = part.leading_rows(first - top, last - top)
            else:
                out[:, first - begin] = part.leading_rows(0, part.shape.numel()).flatten(1)
        return out

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "StackedGradients":
        """Of every slice."""
        slices = {index: part.with_factors(change) for index, part in self.slices.items()}
        return StackedGradients(slices, self.shape, self.num_samples)


class ScaledGradients:
    """Gradients times a constant: undoes the loss scale that keeps float16 from underflowing."""

    def __init__(self, inner: PerSampleGradients, factor: float) -> None:
        self.inner, self.factor, self.shape = inner, factor, inner.shape

    def squared_norms(self) -> Tensor:
        """Quadratic in the factor."""
        return self.inner.squared_norms() * self.factor**2

    def dots(self, v: Tensor) -> Tensor:
        """Linear in the factor."""
        return self.inner.dots(v) * self.factor

    def add_weighted_(self, out: Tensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """Linear in the factor."""
        self.inner.add_weighted_(out, weights, alpha * self.factor)

    def add_powers_(self, out: Tensor, power: int, alpha: float = 1.0) -> None:
        """The factor's own power."""
        self.inner.add_powers_(out, power, alpha * abs(self.factor) ** power)

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """Linear in the factor."""
        return self.inner.axis_dots(u, axis) * self.factor

    def sketches(self, to: SketchMap) -> Tensor:
        """Linear in the factor."""
        return self.inner.sketches(to) * self.factor

    def materialise(self, sample: int) -> Tensor:
        """Linear in the factor."""
        return self.inner.materialise(sample) * self.factor

    def leading_rows(self, begin: int, end: int) -> Tensor:
        """Linear in the factor."""
        return self.inner.leading_rows(begin, end).mul_(self.factor)

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "ScaledGradients":
        """Of what is scaled."""
        return ScaledGradients(self.inner.with_factors(change), self.factor)


class SummedGradients:
    """Several uses of one tensor in a forward, of different kinds: the general case, through dense gradients.

    `combine` builds this only where no cheaper form exists; every question forms one sample's gradient at a time.
    """

    def __init__(self, parts: Sequence[PerSampleGradients], num_samples: int) -> None:
        self.parts, self.shape, self.num_samples = parts, parts[0].shape, num_samples

    def materialise(self, sample: int) -> Tensor:
        """The sum of the uses."""
        total = self.parts[0].materialise(sample).clone()
        for part in self.parts[1:]:
            total += part.materialise(sample)
        return total

    def squared_norms(self) -> Tensor:
        """One dense gradient at a time."""
        return torch.stack([self.materialise(b).double().square().sum() for b in range(self.num_samples)])

    def dots(self, v: Tensor) -> Tensor:
        """Dots are linear in the uses."""
        return torch.stack([part.dots(v) for part in self.parts]).sum(0)

    def add_weighted_(self, out: Tensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """Sums are linear in the uses."""
        for part in self.parts:
            part.add_weighted_(out, weights, alpha)

    def add_powers_(self, out: Tensor, power: int, alpha: float = 1.0) -> None:
        """One dense gradient at a time: powers are of the sum of the uses."""
        for sample in range(self.num_samples):
            out.add_(self.materialise(sample).to(out.dtype).abs().pow(power), alpha=alpha)

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """Dots are linear in the uses."""
        return torch.stack([part.axis_dots(u, axis) for part in self.parts]).sum(0)

    def leading_rows(self, begin: int, end: int) -> Tensor:
        """Rows are linear in the uses."""
        total = self.parts[0].leading_rows(begin, end)
        for part in self.parts[1:]:
            total += part.leading_rows(begin, end)
        return total

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "SummedGradients":
        """Of every use."""
        return SummedGradients([part.with_factors(change) for part in self.parts], self.num_samples)

    def sketches(self, to: SketchMap) -> Tensor:
        """Sketches are linear in the uses."""
        return torch.stack([part.sketches(to) for part in self.parts]).sum(0)


class TiedGradients(SummedGradients):
    """One embedding use and one linear use of the same matrix (tied embedding and head): exact, with the cross term.

    `<G_lookup, G_outer> = sum_{t,s in b} dy_outer[s, id_t] (dy_lookup_t . x_s)`; only the columns `id_t` are read.
    """

    def __init__(self, lookup: LookupGradients, outer: OuterGradients, num_samples: int) -> None:
        super().__init__([lookup, outer], num_samples)
        self.lookup, self.outer = lookup, outer

    def squared_norms(self) -> Tensor:
        """`|G_lookup|^2 + |G_outer|^2 + 2 <G_lookup, G_outer>`."""
        cross = []
        for b in range(self.num_samples):
            t = slice(int(self.lookup.offsets[b]), int(self.lookup.offsets[b + 1]))
            s = slice(int(self.outer.offsets[b]), int(self.outer.offsets[b + 1]))
            dtype = torch.promote_types(self.outer.x.dtype, torch.float32)
            heads = self.outer.dy[s][:, self.lookup.ids[t]].to(dtype)  # [S, T]
            inputs = self.outer.x[s].to(dtype) @ self.lookup.dy[t].to(dtype).T  # [S, T]
            cross.append((heads * inputs).sum(dtype=torch.float64))
        return self.lookup.squared_norms() + self.outer.squared_norms() + 2.0 * torch.stack(cross)

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "TiedGradients":
        """Of both uses."""
        return TiedGradients(self.lookup.with_factors(change), self.outer.with_factors(change), self.num_samples)


def _interleave(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenates row blocks so that each sample's rows from all parts lie together; returns rows and offsets."""
    owner = torch.cat([sample_of_row(o) for o in offsets])
    order = torch.argsort(owner, stable=True)
    return torch.cat(list(parts))[order], torch.stack(list(offsets)).sum(0)


def combine(parts: Sequence[PerSampleGradients], num_samples: int) -> PerSampleGradients:
    """The gradient of a tensor that was used several times: the uses add up before anything is squared."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, DenseGradients) for part in parts):
        return DenseGradients(torch.stack([part.values for part in parts]).sum(0))
    if all(isinstance(part, OuterGradients) for part in parts):
        x, offsets = _interleave([part.x for part in parts], [part.offsets for part in parts])
        dy, _ = _interleave([part.dy for part in parts], [part.offsets for part in parts])
        return OuterGradients(x, dy, offsets)
    if all(isinstance(part, LookupGradients) for part in parts):
        ids, offsets = _interleave([part.ids for part in parts], [part.offsets for part in parts])
        dy, _ = _interleave([part.dy for part in parts], [part.offsets for part in parts])
        return LookupGradients(ids, dy, offsets, parts[0].shape[0])
    if all(isinstance(part, StackedGradients) for part in parts):
        slices = {
            index: combine([part.slices[index] for part in parts if index in part.slices], num_samples)
            for index in sorted({index for part in parts for index in part.slices})
        }
        return StackedGradients(slices, parts[0].shape, num_samples)
    lookups = [part for part in parts if isinstance(part, LookupGradients)]
    outers = [part for part in parts if isinstance(part, OuterGradients)]
    if len(lookups) + len(outers) == len(parts):
        return TiedGradients(combine(lookups, num_samples), combine(outers, num_samples), num_samples)
    return SummedGradients(parts, num_samples)
