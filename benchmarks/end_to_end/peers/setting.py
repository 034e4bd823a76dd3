"""What every peer is given, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fillm.data import Batch, SampleSet, collate, plan_batches


class Absent(Exception):
    """Why a peer does not run here, in words."""


@dataclass(frozen=True)
class Setting:
    """What a peer works on.

    Attributes:
        model: a copy of its own, in eval mode, no parameter requiring a gradient; hooks and flags may stay on it.
        forget, retain: the samples.
        folder: for what it writes; empty.
    """

    model: nn.Module
    forget: SampleSet
    retain: SampleSet
    folder: Path

    @property
    def samples(self) -> SampleSet:
        """Both sets as one, for what knows of no two."""
        return SampleSet([*self.forget, *self.retain], "forget and retain")

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    def batches(self, tokens_per_batch: int) -> list[Batch]:
        """Both sets as one, padded on the right, on the model's device."""
        samples = self.samples
        return [collate(samples, ids).to(self.device) for ids in plan_batches(samples.lengths, tokens_per_batch)]


@dataclass(frozen=True)
class Ready:
    """A peer that can run.

    Attributes:
        run: goes over all samples once, in batches of at most so many tokens, padding included.
        covered: parameters whose gradients enter what it computes.
        note: a setting that the table has to name.
    """

    run: Callable[[int], object]
    covered: int
    note: str = ""


def imported(name: str) -> Any:
    """A peer's module.

    Raises:
        Absent: if it, or something that it needs, is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise Absent(f"not installed: {error}") from None


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Every sample's mean negative log-likelihood over its counted tokens, [B], in nats; differentiable."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return mean_losses(logits, batch.labels)


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T, V] and [B, T] int64, -100 where nothing counts -> [B]."""
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return losses.sum(1) / (targets != -100).sum(1).clamp(min=1)
