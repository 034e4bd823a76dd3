"""Gram matrices of all samples' gradients of one tensor, exact and uncompressed: docs/method.md (7), `<g_i, g_j>`.

Rows of the gradients of all samples, a block at a time, are formed, multiplied with each other and dropped; of samples
so short, or layers so large, that it takes fewer FLOP, the ghost Gram matrix comes from the factors alone.

Products are taken in float32 (float64 for float64 gradients) over at most `PRODUCT_ENTRIES` entries at a time and added
up in float64: what is rounded off is some 1e-7 of `sqrt(q_i q_j)`, below 1e-6. A ghost Gram matrix rounds in proportion
to `sum_t |x_t| |dy_t|` of either sample in the place of `|g_i|`: more where a sample's tokens cancel.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import fillm_kernels as fk
import torch
from fillm_kernels.products import ieee_products, linear
from torch import Tensor

from fillm.capture import PerSampleGradients
from fillm.capture.combined import ScaledGradients, StackedGradients
from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients, add_rows_, row_layout

BLOCK_BYTES = 64 << 20  # of rows of all samples' gradients, formed at a time
PRODUCT_ENTRIES = 4096  # of a gradient, summed in float32 before float64 takes over
STRIPS = 8  # of samples; what lies below the strips of the diagonal is mirrored: 9/16 of the work
LEAST_STRIP = 128  # samples; narrower products take as long as what they save
GHOST_TOKENS = 2048  # of batches that are joined before their pairs are taken
LOOKUP_ROWS = 512  # summed embedding rows multiplied with each other at a time

Kept = list[tuple[PerSampleGradients, Tensor]]  # batches of one tensor, with each sample's position [B]


@dataclass(frozen=True)
class TensorGram:
    """Inner products of one tensor's per-sample gradients, all float64 on the CPU.

    Attributes:
        name: of the tensor.
        numel: `P_l`.
        forget: [m, m] `<f_j, f_j'>`, symmetric.
        cross: [n, m] `<g_i, f_j>`.
        retain: [n, n] `<g_i, g_i'>`, symmetric.
        retain_rows: [n, P_l], the gradients themselves where `P_l <= n`, for a solve in the primal; else None.
        forget_rows: [m, P_l], likewise and under the same condition.
    """

    name: str
    numel: int
    forget: Tensor
    cross: Tensor
    retain: Tensor
    retain_rows: Tensor | None = None
    forget_rows: Tensor | None = None


class KeptGradients:
    """The per-sample gradients of all samples of a set, in the form in which they come, on their device.

    Args:
        formed: tensors whose gradients are kept entry by entry, which must then take less than their factors.
    """

    def __init__(self, formed: Collection[str] = ()) -> None:
        self.formed = frozenset(formed)
        self.kept: dict[str, Kept] = {}

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Keeps a batch."""
        if name in self.formed:
            kept: PerSampleGradients = DenseGradients(
                gradients.leading_rows(0, row_layout(gradients.shape)[0]).view(-1, *gradients.shape)
            )
        else:
            kept = gradients.with_factors(_owned)
        self.kept.setdefault(name, []).append((kept, positions.cpu()))

    def take(self, name: str) -> Kept:
        """What was kept of a tensor, which is then forgotten; nothing if no gradient reached it."""
        return self.kept.pop(name, [])

    def state(self) -> None:
        """None: too much to be saved."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing, for there is no state."""


def held_tensors(gradients: PerSampleGradients) -> list[Tensor]:
    """The tensors of gradients that grow with the batch; those of several tensors of the model may share storage."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    gradients.with_factors(note)
    return found


def _owned(tensor: Tensor) -> Tensor:
    """Without the graph that made it, and without the rest of what it is a view of."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def tensor_gram(name: str, shape: torch.Size, forget: Kept, retain: Kept, m: int, n: int) -> TensorGram:
    """The Gram matrices of one tensor; samples that no batch names have no gradient.

    Args:
        name: of the tensor.
        shape: of the tensor.
        forget: batches of the forget set, positions below `m`.
        retain: batches of the retain set, positions below `n`.
        m: number of forget samples.
        n: number of retain samples.
    """
    both = [*forget, *((gradients, positions + m) for gradients, positions in retain)]
    whole = gram(both, m + n, shape).cpu()
    rows = None
    if shape.numel() <= n:
        rows = torch.zeros(m + n, shape.numel(), dtype=torch.float64)
        for gradients, positions in both:
            rows[positions] = gradients.leading_rows(0, row_layout(shape)[0]).flatten(1).double().cpu()
    return TensorGram(
        name,
        shape.numel(),
        # Copies: a view would keep the whole alive, and could not be saved as it is.
        forget=whole[:m, :m].clone(),
        cross=whole[m:, :m].clone(),
        retain=whole[m:, m:].clone(),
        retain_rows=None if rows is None else rows[m:].clone(),
        forget_rows=None if rows is None else rows[:m].clone(),
    )


def gram(kept: Kept, count: int, shape: torch.Size) -> Tensor:
    """`<g_i, g_j>` of all pairs of samples of one tensor.

    Args:
        kept: batches, each with its samples' rows in the result; a sample in none has gradient zero.
        count: number of samples.
        shape: of the tensor.

    Returns:
        [count, count], float64, symmetric to the bit, on the gradients' device.
    """
    if not kept:
        return torch.zeros(count, count, dtype=torch.float64)
    every = [gradients for gradients, _ in kept]
    if all(isinstance(one, ScaledGradients) for one in every) and len({one.factor for one in every}) == 1:
        return gram([(one.inner, where) for one, where in kept], count, shape) * every[0].factor ** 2
    if all(isinstance(one, StackedGradients) for one in every):
        return _stacked(kept, count, shape)
    if all(isinstance(one, LookupGradients) for one in every):
        return _symmetric(_of_lookups(kept, count))
    if all(isinstance(one, OuterGradients) for one in every) and _ghost_is_cheaper(every, count):
        return _symmetric(_ghost(kept, count))
    return _symmetric(_of_rows(kept, count, shape))


def _symmetric(upper: Tensor) -> Tensor:
    """The upper triangle, mirrored."""
    return upper.triu() + upper.triu(1).T


def _stacked(kept: Kept, count: int, shape: torch.Size) -> Tensor:
    """Slices are disjoint: their Gram matrices add."""
    total = None
    for index in sorted({index for one, _ in kept for index in one.slices}):
        part = gram([(one.slices[index], where) for one, where in kept if index in one.slices], count, shape[1:])
        total = part if total is None else total.add_(part)
    return torch.zeros(count, count, dtype=torch.float64) if total is None else total


def _strips(count: int) -> Iterator[slice]:
    """Of samples, so that `strip.start` on against `strip` covers every pair once or, near the diagonal, twice."""
    height = max(LEAST_STRIP, -(-count // STRIPS))
    for begin in range(0, count, height):
        yield slice(begin, min(begin + height, count))


def _of_rows(kept: Kept, count: int, shape: torch.Size) -> Tensor:
    """Block by block of rows: `K += M M^T`, of which the strips on and above the diagonal are filled."""
    empty = kept[0][0].leading_rows(0, 0)
    dtype = torch.float64 if any(one.leading_rows(0, 0).dtype == torch.float64 for one, _ in kept) else torch.float32
    rows, columns = row_layout(shape)
    height = max(1, BLOCK_BYTES // (max(1, count * columns) * dtype.itemsize))
    out = torch.zeros(count, count, dtype=torch.float64, device=empty.device)
    space = torch.empty(count * min(height, rows) * columns, dtype=dtype, device=empty.device)
    for begin in range(0, rows, height):
        end = min(begin + height, rows)
        block = space[: count * (end - begin) * columns].zero_().view(count, end - begin, columns)
        for gradients, where in kept:
            block[where.to(block.device)] = gradients.leading_rows(begin, end).to(dtype)
        block = block.flatten(1)
        with ieee_products():
            for first in range(0, block.shape[1], PRODUCT_ENTRIES):
                piece = block[:, first : first + PRODUCT_ENTRIES]
                for strip in _strips(count):
                    out[strip, strip.start :] += linear(piece[strip], piece[strip.start :])
    return out


def _ghost_is_cheaper(every: Sequence[OuterGradients], count: int) -> bool:
    """By multiply-adds: `N^2 (I + O) / 2` over pairs of tokens, against forming all gradients and their products."""
    outputs, inputs = every[0].shape
    tokens = sum(one.x.shape[0] for one in every)
    return tokens**2 / 2 * (inputs + outputs) < outputs * inputs * (tokens + count**2 / 2)


def _ghost(kept: Kept, count: int) -> Tensor:
    """Pairs of joined batches; both of `(i, j)` and `(j, i)` where they meet in one batch or swap their order."""
    joined = list(_joined(kept))
    out = torch.zeros(count, count, dtype=torch.float64, device=joined[0][0].x.device)
    for number, (one, rows) in enumerate(joined):
        for other, columns in joined[number:]:
            part = fk.ghost_gram(one.x, one.dy, one.offsets, other.x, other.dy, other.offsets).double()
            rows, columns = rows.to(out.device), columns.to(out.device)
            out[rows[:, None], columns] = part
            out[columns[:, None], rows] = part.T
    return out


def _joined(kept: Kept) -> Iterator[tuple[OuterGradients, Tensor]]:
    """Neighbouring batches as one, up to `GHOST_TOKENS`, so that batches of one sample do not make a call a pair."""
    waiting: Kept = []
    for gradients, where in kept:
        tokens = sum(one.x.shape[0] for one, _ in waiting)
        if waiting and tokens + gradients.x.shape[0] > GHOST_TOKENS:
            yield _join(waiting)
            waiting = []
        waiting.append((gradients, where))
    if waiting:
        yield _join(waiting)


def _join(kept: Kept) -> tuple[OuterGradients, Tensor]:
    if len(kept) == 1:
        return kept[0]
    x, dy = (torch.cat([getattr(one, factor) for one, _ in kept]) for factor in ("x", "dy"))
    return OuterGradients(x, dy, _joined_offsets([one.offsets for one, _ in kept])), torch.cat([w for _, w in kept])


def _joined_offsets(several: Sequence[Tensor]) -> Tensor:
    lengths = torch.cat([offsets.diff() for offsets in several])
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _of_lookups(kept: Kept, count: int) -> Tensor:
    """Only rows of the same id meet: `sum over ids of <sum_t dy_t of i, sum_t dy_t of j>`.

    Distinct (id, sample) pairs, sorted by id, are multiplied in blocks of whole ids and masked.
    """
    every = [one for one, _ in kept]
    grouped = [one.grouped() for one in every]
    samples = torch.cat([where.to(g[0].device)[g[0]] for g, (_, where) in zip(grouped, kept, strict=True)])
    ids, rows = torch.cat([g[1] for g in grouped]), torch.cat([g[2] for g in grouped])
    ids, order = torch.sort(ids, stable=True)
    samples, rows = samples[order], rows[order]
    out = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    with ieee_products():
        for block in _whole_ids(ids):
            here, owner = ids[block], samples[block]
            pairs = linear(rows[block], rows[block]).masked_fill(here[:, None] != here, 0.0).double()
            by_first = add_rows_(pairs.new_zeros(count, owner.numel()), owner, pairs)
            add_rows_(out, owner, by_first.T)
    return out


def _whole_ids(ids: Tensor) -> Iterator[slice]:
    """Blocks of about `LOOKUP_ROWS` sorted ids [U] that part no id."""
    ends = torch.unique_consecutive(ids, return_counts=True)[1].cumsum(0).tolist()
    begin = 0
    for end, following in zip_longest(ends, ends[1:]):
        if following is None or following - begin > LOOKUP_ROWS:
            yield slice(begin, end)
            begin = end
