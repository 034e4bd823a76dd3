"""The forward pass and each sample's own loss."""

import inspect
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


def sample_losses(model: nn.Module, batch: Batch, reduction: LossReduction = "mean") -> Tensor:
    """Negative log-likelihood of every sample over its own answer tokens, as with batch size 1 (docs/method.md).

    Args:
        model: a causal language model in eval mode.
        batch: [R, T] tokens of B samples in any layout.
        reduction: `mean` or `sum` over a sample's answer tokens.

    Returns:
        [B], float32 (float64 for a float64 model), in nats per answer token (`mean`) or nats (`sum`).
    """
    inputs, wanted = model_inputs(model, batch), targets(batch)
    counted = wanted != IGNORED
    first = int(counted.any(0).int().argmax())
    if batch.layout != "packed" and first > 0 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        # Positions before the first answer token of the batch carry no loss: the head need not see them.
        wanted, counted = wanted[:, first:], counted[:, first:]
        inputs["logits_to_keep"] = wanted.shape[1]
    logits = model(**inputs).logits
    picked = counted.reshape(-1).nonzero().squeeze(1)
    rows = logits.reshape(-1, logits.shape[-1]).index_select(0, picked)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    nll = nn.functional.cross_entropy(rows, wanted.reshape(-1)[picked], reduction="none")
    packed = batch.layout == "packed"
    owner = sample_of_row(batch.offsets)[picked] if packed else picked // wanted.shape[1]
    tokens = torch.bincount(owner, minlength=len(batch.indices))
    offsets = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])
    total = segment_sum(nll, offsets)
    return total / tokens.clamp(min=1) if reduction == "mean" else total
