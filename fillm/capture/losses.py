"""The forward pass and each sample's own loss."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fillm.capture.gradients import sample_of_row, segment_sum
from fillm.data import Batch

LossReduction = Literal["mean", "sum"]
IGNORED = -100


def targets(batch: Batch) -> Tensor:
    """What each position has to predict: the next token's label of the same sample, [R, T], else -100."""
    labels = batch.labels.clone()
    if batch.layout == "packed":
        # The last token of a sample is followed by the next sample's first.
        labels[0, batch.offsets[:-1]] = IGNORED
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of the model's forward for one batch.

    Right padding needs no mask in a causal model: no token sees what comes after it, and padding carries no loss.
    """
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.layout == "left":
        inputs["attention_mask"] = batch.attention_mask
    if batch.layout != "right" and ("position_ids" in accepted or takes_any):
        inputs["position_ids"] = batch.position_ids
    return inputs


def answer_offsets(batch: Batch) -> Tensor:
    """Where each sample's answer tokens begin among those of the batch, in grid order, [B + 1]."""
    counted = (targets(batch) != IGNORED).reshape(-1)
    owner = sample_of_row(batch.offsets)[counted.nonzero().squeeze(1)]
    counts = torch.bincount(owner, minlength=len(batch.indices))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@contextmanager
def head_sees_only(model: nn.Module, positions: Tensor, num_positions: int) -> Iterator[None]:
    """Hands the output embedding the hidden states at `positions` of the flattened grid alone, as [1, R, H].

    The others carry no loss, so neither do their logits, and at the vocabulary's width they would cost the most.
    """

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.shape[:-1].numel() != num_positions:
            return None
        return hidden.reshape(num_positions, -1).index_select(0, positions)[None], *args[1:]

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handle = None if head is None else head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def sample_losses(model: nn.Module, batch: Batch, reduction: LossReduction = "mean") -> Tensor:
    """Negative log-likelihood of every sample over its own answer tokens, as with batch size 1 (docs/method.md).

    Args:
        model: a causal language model in eval mode.
        batch: [R, T] tokens of B samples in any layout.
        reduction: `mean` or `sum` over a sample's answer tokens.

    Returns:
        [B], float32 (float64 for a float64 model), in nats per answer token (`mean`) or nats (`sum`).
    """
    wanted = targets(batch).reshape(-1)
    picked = (wanted != IGNORED).nonzero().squeeze(1)
    with head_sees_only(model, picked, wanted.numel()):
        logits = model(**model_inputs(model, batch)).logits
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.shape[0] != picked.numel():  # a head of another make
        rows = rows.index_select(0, picked)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    nll = nn.functional.cross_entropy(rows, wanted[picked], reduction="none")
    offsets = answer_offsets(batch)
    total = segment_sum(nll, offsets)
    return total / offsets.diff().clamp(min=1) if reduction == "mean" else total
