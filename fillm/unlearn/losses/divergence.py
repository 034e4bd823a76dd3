"""Cross entropy and Kullback-Leibler divergence to given distributions, a block of rows at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fillm.capture.losses import row_blocks

LogProbs = Callable[[slice], Tensor]  # rows of a batch -> [rows, V] log-probabilities, float32 or float64


class Divergence(torch.autograd.Function):
    """Of every row of logits z, `-sum_v q_v log softmax(z)_v`, less the entropy of q where the divergence is wanted.

    The gradient of both is `softmax(z) - q`. Neither the given distributions nor those of the model are held for more
    than a block of rows; the backward pass makes them again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_probs: LogProbs, less_entropy: bool) -> Tensor:
        """[N, V], any float type -> [N], float32 (float64 for float64), in nats."""
        ctx.save_for_backward(logits)
        ctx.log_probs = log_probs
        out = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in row_blocks(logits):
            given = log_probs(rows).to(out.dtype)
            own = torch.log_softmax(logits[rows], 1, dtype=out.dtype)
            out[rows] = (given.exp() * (given - own if less_entropy else -own)).sum(1)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """[N] -> [N, V], in the logits' dtype."""
        (logits,) = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in row_blocks(logits):
            block = torch.softmax(logits[rows], 1, dtype=slope.dtype)
            block.sub_(ctx.log_probs(rows).to(slope.dtype).exp()).mul_(slope[rows, None])
            out[rows] = block
        return out, None, None
