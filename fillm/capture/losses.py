"""The forward pass and each sample's own loss."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fillm.capture.segments import sample_of_row, segment_sum
from fillm.data import Batch

LossReduction = Literal["mean", "sum"]
IGNORED = -100
LOGIT_ROWS = 64  # at a vocabulary of 4096 a block is 1 MiB and stays in cache between its steps


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


class NegativeLogLikelihood(torch.autograd.Function):
    """Of the wanted token of every row of logits, `log sum_v exp(z_v) - z_wanted`, a block of rows at a time.

    Logits are the largest tensor of a pass. Nothing of their size is made but their gradient, `softmax(z) - onehot`,
    which is exact to rounding even where the model is certain.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        """[R, V], any float type, and [R] -> [R], float32 (float64 for float64), in nats."""
        ctx.save_for_backward(logits, wanted)
        out = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in row_blocks(logits):
            out[rows] = nn.functional.cross_entropy(logits[rows].to(out.dtype), wanted[rows], reduction="none")
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        """[R] -> [R, V], in the logits' dtype."""
        logits, wanted = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in row_blocks(logits):
            block = out[rows] if out.dtype == slope.dtype else slope.new_empty(out[rows].shape)
            torch.softmax(logits[rows], 1, dtype=block.dtype, out=block)
            # p - 1 of a token known by heart would keep few digits of 1 - p: the others' sum keeps them all.
            block.scatter_(1, wanted[rows, None], 0.0)
            block.scatter_(1, wanted[rows, None], -block.sum(1, keepdim=True))
            block.mul_(slope[rows, None])
            if block.dtype != out.dtype:
                out[rows] = block
        return out, None


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Runs of `LOGIT_ROWS` rows, in order: what has the width of the vocabulary is made a block at a time."""
    return (slice(begin, begin + LOGIT_ROWS) for begin in range(0, rows.shape[0], LOGIT_ROWS))


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits that predict the answer tokens of a batch, and these tokens.

    Args:
        model: a causal language model.
        batch: [R, T] tokens of B samples in any layout.

    Returns:
        [N, V], in the model's dtype, and [N] int64: the N answer tokens of the batch in grid order, so sample by sample
        (`answer_offsets`).
    """
    wanted = targets(batch).reshape(-1)
    picked = (wanted != IGNORED).nonzero().squeeze(1)
    with head_sees_only(model, picked, wanted.numel()):
        logits = model(**model_inputs(model, batch)).logits
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.shape[0] != picked.numel():  # a head of another make
        rows = rows.index_select(0, picked)
    return rows, wanted[picked]


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of every answer token: [N], float32 (float64 for a float64 model), in nats."""
    return NegativeLogLikelihood.apply(*answer_logits(model, batch))


def over_samples(values: Tensor, batch: Batch, reduction: LossReduction = "mean") -> Tensor:
    """Mean or sum of every sample's answer tokens: [N] -> [B]."""
    offsets = answer_offsets(batch)
    total = segment_sum(values, offsets)
    return total / offsets.diff().clamp(min=1) if reduction == "mean" else total


def sample_losses(model: nn.Module, batch: Batch, reduction: LossReduction = "mean") -> Tensor:
    """Negative log-likelihood of every sample over its own answer tokens, as with batch size 1 (docs/method.md).

    Args:
        model: a causal language model in eval mode.
        batch: [R, T] tokens of B samples in any layout.
        reduction: `mean` or `sum` over a sample's answer tokens.

    Returns:
        [B], float32 (float64 for a float64 model), in nats per answer token (`mean`) or nats (`sum`).
    """
    return over_samples(token_losses(model, batch), batch, reduction)
