"""What a store writer holds in memory: the batch in hand, and the block that finished batches are added to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fillm.capture import PerSampleGradients
from fillm.data import Sample
from fillm.statistics.store import sample_fingerprint
from fillm.statistics.store_format import MapOfTensor
from fillm.statistics.store_rows import sha256_of


class OpenBatch:
    """Rows of the batch in hand, as its tensors are observed.

    Args:
        maps: of every tensor, by name.
        dtype: of the stored sketches.
    """

    def __init__(self, maps: Mapping[str, MapOfTensor], dtype: torch.dtype) -> None:
        self._maps, self._dtype = maps, dtype
        self._clear()

    def _clear(self) -> None:
        self._seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in self._maps}
        self._not_finite: list[tuple[str, int]] = []

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Takes one tensor's gradients of the batch, or of a part of it."""
        to, where = self._maps[name], positions.cpu()
        rows = gradients.sketches(to)
        # Rounding to the stored dtype must not reach the norms.
        q = rows.double().square().sum(1) if to.kind == "exact" else gradients.squared_norms()
        rows, q = rows.detach().to("cpu", self._dtype, copy=True), q.detach().to("cpu", torch.float64)
        self._seen[name].append((where, rows, q))
        spoilt = ~(rows.isfinite().all(1) & q.isfinite())
        if bool(spoilt.any()):
            self._not_finite.append((name, int(where[spoilt][0])))

    def first_not_finite(self, positions: Sequence[int]) -> tuple[str, int] | None:
        """The first tensor of the batch with a NaN or infinite row, and the sample."""
        return next((found for found in self._not_finite if found[1] in positions), None)

    def take(self, positions: Sequence[int]) -> list[Tensor]:
        """Ends the batch: [B, dim] of every tensor and [B, L] squared norms; what no gradient has reached is zero."""
        row_of = {position: row for row, position in enumerate(positions)}
        parts = []
        norms = torch.zeros(len(positions), len(self._maps), dtype=torch.float64)
        for index, (name, to) in enumerate(self._maps.items()):
            rows = torch.zeros(len(positions), to.dim, dtype=self._dtype)
            for where, values, q in self._seen[name]:
                at = torch.tensor([row_of[position] for position in where.tolist()])
                rows[at], norms[at, index] = values, q
            parts.append(rows)
        self._clear()
        return [*parts, norms]


class OpenBlock:
    """Rows of finished batches that are not stored yet.

    Args:
        maps: of every tensor, by name.

    Attributes:
        positions: of the samples.
        batches: how many these are.
        nbytes: of their rows, squared norms included.
    """

    def __init__(self, maps: Mapping[str, MapOfTensor]) -> None:
        self.positions: list[int] = []
        self.batches = self.nbytes = 0
        self._parts: list[list[Tensor]] = [[] for _ in range(len(maps) + 1)]
        self._losses: list[float] = []
        self._fallback: dict[str, str] = {}

    def add(
        self, positions: Sequence[int], parts: Sequence[Tensor], losses: Tensor, fallback: Mapping[str, str]
    ) -> None:
        """Adds a batch.

        Args:
            positions: of its samples.
            parts: as `OpenBatch.take` gave them.
            losses: [B] of each.
            fallback: tensors that the pass has had no rule for so far, and why.
        """
        for rows, part in zip(self._parts, parts, strict=True):
            rows.append(part)
            self.nbytes += part.nbytes
        self.positions.extend(positions)
        self._losses.extend(losses.tolist())
        self._fallback = dict(fallback)
        self.batches += 1

    def parts(self) -> list[Tensor]:
        """[rows, dim] of every tensor, and [rows, L] squared norms."""
        return [torch.cat(rows) for rows in self._parts]

    def record(self, samples: Sequence[Sample], parts: Sequence[Tensor]) -> dict[str, Any]:
        """What the block's file says of it.

        Args:
            samples: the data set.
            parts: as `parts` gave them.
        """
        own = [samples[position] for position in self.positions]
        *sketches, squared_norms = [sha256_of(part) for part in parts]
        return {
            "rows": len(own),
            "ids": [sample.id for sample in own],
            "positions": self.positions,
            "fingerprints": [sample_fingerprint(sample) for sample in own],
            "tokens": [sample.num_tokens for sample in own],
            "losses": self._losses,
            "fallback": self._fallback,
            "sha256": {"sketches": sketches, "squared_norms": squared_norms},
        }
