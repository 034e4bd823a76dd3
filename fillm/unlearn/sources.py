"""What the terms of a loss are computed from: samples, other answers, and what the untouched model said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fillm.data import Batch, SampleSet, collate
from fillm.unlearn.losses import UnlearnLoss
from fillm.unlearn.reference import ReferenceCache, ReferenceRows


@dataclass(frozen=True)
class Sources:
    """The sets of a run.

    Attributes:
        forget: what is to be forgotten.
        retain: what is to be kept.
        alternatives: the forget samples with other answers, position by position; None where the loss has no use.
        references: by set (`forget`, `retain`, `alternatives`), what the loss needs of the untouched model.
    """

    forget: SampleSet
    retain: SampleSet
    alternatives: SampleSet | None = None
    references: Mapping[str, ReferenceCache] = field(default_factory=dict)

    def forget_values(
        self, loss: UnlearnLoss, model: nn.Module, positions: Sequence[int], device: torch.device
    ) -> Tensor:
        """The forget term of the samples at `positions`, [len(positions)], with gradient."""
        batch = collate(self.forget, positions).to(device)
        rows = self._rows("forget", batch)
        if self.alternatives is None:
            return loss.forget_values(model, batch, rows)
        others = collate(self.alternatives, positions).to(device)
        return loss.forget_values(model, batch, rows, others, self._rows("alternatives", others))

    def retain_values(
        self, loss: UnlearnLoss, model: nn.Module, positions: Sequence[int], device: torch.device
    ) -> Tensor:
        """The retain term of the samples at `positions`, [len(positions)], with gradient."""
        batch = collate(self.retain, positions).to(device)
        return loss.retain_values(model, batch, self._rows("retain", batch))

    def _rows(self, which: str, batch: Batch) -> ReferenceRows | None:
        return self.references[which].rows(batch.indices, batch.input_ids.device) if which in self.references else None
