"""Length-bucketed batches under a token budget, and the three layouts a batch can have on a device."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from fillm.data.samples import IGNORED, SampleSet
from fillm.errors import UsageError

DEFAULT_TOKENS_PER_BATCH = 2048

Layout = Literal["right", "left", "packed"]


@dataclass
class Batch:
    """Some samples as tensors. R rows of T tokens: `right` and `left` have R = B, `packed` has R = 1.

    A packed row carries no padding, so transformers finds the borders of its samples from `position_ids`, and does
    so only when the model is called with `attention_mask=None`.

    Attributes:
        indices: [B] int64, position of each sample in its `SampleSet`.
        input_ids: [R, T] int64; padding repeats the sample's own last token.
        labels: [R, T] int64, -100 where nothing counts; never shifted.
        attention_mask: [R, T] int64, 1 at tokens, 0 at padding.
        position_ids: [R, T] int64, from 0 at each sample's first token; 0 at padding on the left, counting on at
            padding on the right.
        lengths: [B] int64, tokens of each sample.
        offsets: [B + 1] int64 into the flattened R * T tokens: where each sample's slot begins, and the end. Padding
            belongs to its sample's slot.
        layout: `right`, `left` or `packed`.
    """

    indices: Tensor
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    lengths: Tensor
    offsets: Tensor
    layout: Layout

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def plan_batches(
    lengths: Sequence[int],
    tokens_per_batch: int | None = None,
    *,
    max_samples: int | None = None,
    shuffle_seed: int | None = None,
) -> list[list[int]]:
    """Groups samples of similar length so that a padded batch stays within the token budget.

    Args:
        lengths: tokens of each sample, at least 1.
        tokens_per_batch: most tokens of a batch, padding included (samples times longest); None is 2048. A sample
            that is longer gets a batch of its own.
        max_samples: most samples of a batch; None for no limit.
        shuffle_seed: None puts the batches longest first, so that a lack of memory shows at once, and samples by
            falling length, ties by index. A seed puts batches, samples in a batch and ties into random order.

    Returns:
        Positions of the samples, batch by batch; every position once. Deterministic.

    Raises:
        UsageError: if a limit is below 1 or a sample is empty.
    """
    budget = DEFAULT_TOKENS_PER_BATCH if tokens_per_batch is None else tokens_per_batch
    if budget < 1:
        raise UsageError(f"--tokens-per-batch {budget}: give at least 1")
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"at most {max_samples} samples a batch: give at least 1")
    if any(length < 1 for length in lengths):
        raise UsageError(f"sample {next(i for i, n in enumerate(lengths) if n < 1)} has no tokens; leave it out")
    draw = random.Random(shuffle_seed)
    ties: Sequence[float] = range(len(lengths))
    if shuffle_seed is not None:
        ties = [draw.random() for _ in lengths]
    batches: list[list[int]] = []
    limit = 0  # samples that the open batch may hold; its first sample is its longest
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], ties[i])):
        if not batches or len(batches[-1]) >= limit:
            batches.append([])
            limit = max(1, budget // lengths[index])
            limit = limit if max_samples is None else min(limit, max_samples)
        batches[-1].append(index)
    if shuffle_seed is not None:
        batches = [sorted(batch, key=lambda _: draw.random()) for batch in batches]
        batches.sort(key=lambda _: draw.random())
    return batches


def collate(samples: SampleSet, indices: Sequence[int], layout: Layout = "right") -> Batch:
    """The samples at `indices`, in that order, as one batch on the CPU.

    Args:
        samples: the set that `indices` point into.
        indices: positions, at least one.
        layout: `right` or `left` padding to the longest, or `packed` into one row without padding.

    Raises:
        UsageError: if the layout is unknown or no index is given.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"batch layout {layout!r}: choose one of {', '.join(get_args(Layout))}")
    if not len(indices):
        raise UsageError("a batch needs at least one sample")
    chosen = [samples[int(index)] for index in indices]
    lengths = [sample.num_tokens for sample in chosen]
    if layout == "packed":
        width, offsets = sum(lengths), [0, *accumulate(lengths)]
        rows = [
            (
                [token for sample in chosen for token in sample.input_ids],
                [label for sample in chosen for label in sample.labels],
                [1] * width,
                [position for length in lengths for position in range(length)],
            )
        ]
    else:
        width = max(lengths)
        offsets = [width * row for row in range(len(chosen) + 1)]
        rows = [_padded_row(sample.input_ids, sample.labels, width, layout == "left") for sample in chosen]
    input_ids, labels, mask, positions = (torch.tensor(column, dtype=torch.int64) for column in zip(*rows, strict=True))
    return Batch(
        indices=torch.tensor([int(index) for index in indices], dtype=torch.int64),
        input_ids=input_ids,
        labels=labels,
        attention_mask=mask,
        position_ids=positions,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        offsets=torch.tensor(offsets, dtype=torch.int64),
        layout=layout,
    )


def _padded_row(
    tokens: Sequence[int], labels: Sequence[int], width: int, left: bool
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Token ids, labels, mask and positions of one sample, each [width]."""
    length, gap = len(tokens), width - len(tokens)
    padding = [tokens[-1]] * gap  # any valid id will do: the mask hides it and its label does not count
    if left:
        positions = [0] * gap + list(range(length))
        return [*padding, *tokens], [IGNORED] * gap + list(labels), [0] * gap + [1] * length, positions
    return [*tokens, *padding], list(labels) + [IGNORED] * gap, [1] * length + [0] * gap, list(range(width))
