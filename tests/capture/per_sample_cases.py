"""Per-sample gradients of every class, made to order, with the same gradients entry by entry in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fillm.capture import PerSampleGradients
from fillm.capture.combined import ScaledGradients, StackedGradients, SummedGradients, TiedGradients
from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients

LENGTHS = (3, 0, 5, 1, 4)  # rows of each sample, one of them without any
BATCH = len(LENGTHS)
FACTOR = 0.25
ROUNDING = 2.0**-24


@dataclass
class Case:
    """One batch.

    Attributes:
        gradients: what is examined.
        dense: [B, *shape], float64.
        size: [B, *shape], what rounding is in proportion to: the sum of the terms' absolute values.
    """

    gradients: PerSampleGradients
    dense: Tensor
    size: Tensor

    @property
    def bound(self) -> Tensor:
        """At most 2 * 5 terms to an entry, a product and an addition each, then the factor: 24 roundings and some."""
        return 32 * ROUNDING * self.size


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def outer(
    outputs: int = 7,
    inputs: int = 6,
    seed: int = 0,
    transposed: bool = False,
    lengths: tuple[int, ...] = LENGTHS,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A linear layer's; `transposed` as GPT-2 stores it."""
    rows, offsets = sum(lengths), offsets_of(lengths)
    x, dy = _drawn(rows, inputs, seed=seed).to(dtype), _drawn(rows, outputs, seed=seed + 1).to(dtype)
    dense, size = torch.zeros(2, len(lengths), outputs, inputs, dtype=torch.float64)
    for b in range(len(lengths)):
        for t in range(int(offsets[b]), int(offsets[b + 1])):
            term = dy[t].double()[:, None] * x[t].double()
            dense[b] += term
            size[b] += term.abs()
    if transposed:
        dense, size = dense.transpose(1, 2), size.transpose(1, 2)
    return Case(OuterGradients(x, dy, offsets, transposed), dense, size)


def lookup(num_rows: int = 7, width: int = 6, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Case:
    """An embedding's, whose ids repeat within samples and across them."""
    rows, offsets = sum(lengths), offsets_of(lengths)
    ids = torch.randint(0, num_rows - 1, (rows,), generator=torch.Generator().manual_seed(seed))
    dy = _drawn(rows, width, seed=seed + 1)
    dense, size = torch.zeros(2, len(lengths), num_rows, width, dtype=torch.float64)
    for b in range(len(lengths)):
        for t in range(int(offsets[b]), int(offsets[b + 1])):
            dense[b, ids[t]] += dy[t].double()
            size[b, ids[t]] += dy[t].double().abs()
    return Case(LookupGradients(ids, dy, offsets, num_rows), dense, size)


def dense(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """Held outright."""
    values = _drawn(BATCH, *shape, seed=seed).to(dtype)
    return Case(DenseGradients(values), values.double(), values.double().abs())


def stacked(parts: dict[int, Case], experts: int) -> Case:
    """A stack of which some slices have a gradient."""
    shape = next(iter(parts.values())).dense.shape
    whole, size = torch.zeros(2, shape[0], experts, *shape[1:], dtype=torch.float64)
    for index, part in parts.items():
        whole[:, index], size[:, index] = part.dense, part.size
    slices = {index: part.gradients for index, part in parts.items()}
    return Case(StackedGradients(slices, whole.shape[1:], shape[0]), whole, size)


def scaled(inner: Case) -> Case:
    """Times a constant."""
    return Case(ScaledGradients(inner.gradients, FACTOR), inner.dense * FACTOR, inner.size * FACTOR)


def summed(*parts: Case) -> Case:
    """Several uses of one tensor."""
    gradients = SummedGradients([part.gradients for part in parts], len(parts[0].dense))
    return Case(gradients, sum(part.dense for part in parts), sum(part.size for part in parts))


def tied(seed: int = 0) -> Case:
    """Embedding and head at once."""
    first, second = lookup(seed=seed), outer(seed=seed + 2)
    gradients = TiedGradients(first.gradients, second.gradients, BATCH)
    return Case(gradients, first.dense + second.dense, first.size + second.size)


CASES: dict[str, Callable[[int], Case]] = {
    "outer": lambda seed: outer(seed=seed),
    "outer, equal lengths": lambda seed: outer(seed=seed, lengths=(2,) * BATCH),
    "outer, transposed": lambda seed: outer(seed=seed, transposed=True),
    "outer, bfloat16": lambda seed: outer(seed=seed, dtype=torch.bfloat16),
    "outer, float64": lambda seed: outer(seed=seed, dtype=torch.float64),
    "lookup": lambda seed: lookup(seed=seed),
    "scalar": lambda seed: dense(seed=seed),
    "vector": lambda seed: dense(9, seed=seed),
    "matrix": lambda seed: dense(5, 3, seed=seed),
    "convolution": lambda seed: dense(4, 3, 2, seed=seed),
    "stack of layers": lambda seed: stacked({3: outer(seed=seed), 0: outer(seed=seed + 2)}, 4),
    "stack of stored transposes": lambda seed: stacked({1: outer(seed=seed, transposed=True)}, 3),
    "stack of matrices": lambda seed: stacked({2: dense(4, 3, seed=seed), 1: dense(4, 3, seed=seed + 1)}, 3),
    "stack of vectors": lambda seed: stacked({1: dense(5, seed=seed), 2: dense(5, seed=seed + 1)}, 4),
    "scaled": lambda seed: scaled(outer(seed=seed)),
    "scaled lookup": lambda seed: scaled(lookup(seed=seed)),
    "summed": lambda seed: summed(outer(seed=seed), dense(7, 6, seed=seed)),
    "tied": lambda seed: tied(seed),
    "scaled tied": lambda seed: scaled(tied(seed)),
}
