"""Gram matrices of gradients, formed or behind the rows that they are the inner products of."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_ENTRIES = 1 << 18  # of rows that are widened to float64 at a time: two megabytes, which stay in the cache
FEW_COLUMNS = 8  # up to which a product is over before several threads have met


class Gram(Protocol):
    """Inner products of the retain gradients among themselves: a symmetric [n, n] matrix `K`."""

    def product(self, c: Tensor) -> Tensor:
        """`K c`: [n, m] -> [n, m], float64."""
        ...

    def square(self, c: Tensor) -> Tensor:
        """`c^T K c = |sum_i c_i g_i|^2` column by column: [n, m] -> [m], float64."""
        ...

    def product_and_square(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both of them, of the same combinations: less than one after the other."""
        ...

    def part(self, samples: Tensor) -> Tensor:
        """The rows and columns of some samples: [h] int64 -> [h, h], float64."""
        ...


@dataclass(frozen=True)
class DenseGram:
    """A Gram matrix that was computed: `matrix` [n, n], float64."""

    matrix: Tensor

    def product(self, c: Tensor) -> Tensor:
        """Directly."""
        return self.matrix @ c

    def square(self, c: Tensor) -> Tensor:
        """Directly; rounding leaves nothing below zero."""
        return self.product_and_square(c)[1]

    def product_and_square(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Directly."""
        product = self.matrix @ c
        return product, (c * product).sum(0).clamp(min=0.0)

    def part(self, samples: Tensor) -> Tensor:
        """Directly."""
        return self.matrix[samples][:, samples]


@dataclass(frozen=True)
class RowsGram:
    """A Gram matrix given by vectors: `K = R R^T` with `rows` R [n, k], each times its entry of `scale` [n].

    `R` may be a file's memory in a narrow type: some rows at a time are widened to float64, always in the same memory.
    """

    rows: Tensor
    scale: Tensor

    def times(self, right: Tensor) -> Tensor:
        """`R right`: [k, m] -> [n, m], float64."""
        columns = right.double().T.contiguous()  # rows along the wide matrix: skinny products are slow the other way
        out = torch.empty(columns.shape[0], len(self.rows), dtype=torch.float64)
        with _few_threads(len(columns)):
            for start, block in float64_blocks(self.rows):
                out[:, start : start + len(block)] = columns @ block.T
        return out.T * self.scale[:, None]

    def combined(self, c: Tensor) -> Tensor:
        """`R^T c`: [n, m] -> [k, m], float64."""
        weights = (c.double() * self.scale[:, None]).T.contiguous()
        out = torch.zeros(len(weights), self.rows.shape[1], dtype=torch.float64)
        with _few_threads(len(weights)):
            for start, block in float64_blocks(self.rows):
                out.addmm_(weights[:, start : start + len(block)], block)
        return out.T.contiguous()

    def lengths(self) -> Tensor:
        """Squared lengths of the rows of `R`, whatever `scale` says: [n], float64."""
        out = torch.empty(len(self.rows), dtype=torch.float64)
        with _few_threads(1):
            for start, block in float64_blocks(self.rows):
                torch.sum(block.square_(), 1, out=out[start : start + len(block)])
        return out

    def product(self, c: Tensor) -> Tensor:
        """Through the k numbers of the combined vector; no [n, n] is formed."""
        return self.times(self.combined(c))

    def square(self, c: Tensor) -> Tensor:
        """The combined vector's squared length."""
        return self.combined(c).square().sum(0)

    def product_and_square(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both through the one combined vector."""
        combined = self.combined(c)
        return self.times(combined), combined.square().sum(0)

    def part(self, samples: Tensor) -> Tensor:
        """From the rows of these samples."""
        some = self.rows[samples].double() * self.scale[samples, None]
        return some @ some.T


def float64_blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some rows of [n, k] at a time in float64, and where they begin: good until the next, free to be written to."""
    step = max(1, BLOCK_ENTRIES // max(1, rows.shape[1]))
    memory = torch.empty(min(step, len(rows)), rows.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        yield start, memory[: len(block)].copy_(block)


@contextlib.contextmanager
def _few_threads(columns: int) -> Iterator[None]:
    """One thread for products of few columns, which wait for the memory and not for arithmetic.

    With blocks this small several threads meet every other millisecond: no faster on a quiet machine, a hundred times
    slower beside another program.
    """
    threads = torch.get_num_threads()
    if columns <= FEW_COLUMNS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
