"""In which form a model's answers to a set are kept, and the forward passes that give them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fillm.capture import frozen
from fillm.capture.losses import answer_logits, sample_losses
from fillm.data import Batch, SampleSet, collate
from fillm.unlearn.block_states import answer_states

Head = dict[str, Tensor | None]  # `weight` [V, H] and `bias` [V] or None of an output embedding


@dataclass(frozen=True)
class Form:
    """How rows are kept.

    Attributes:
        name: `nll`, `block`, `log-probabilities` or `head-inputs`.
        layer: the block of `block`.
        row_bytes: of one row: of a sample's for `nll`, else of an answer token's.
        nbytes: of the whole set and, with `head-inputs`, the head.
    """

    name: str
    layer: int | None
    row_bytes: int
    nbytes: int

    @property
    def what(self) -> str:
        """In words, for messages."""
        return {
            "nll": "the loss of every answer",
            "block": f"the output of block {self.layer} at every answer token",
            "log-probabilities": "log-probabilities at every answer token",
            "head-inputs": "the last hidden state at every answer token, and the output embedding",
        }[self.name]

    def bytes_of(self, samples: int, tokens: int) -> int:
        """Of the rows of some samples with so many answer tokens together."""
        return self.row_bytes * (samples if self.name == "nll" else tokens)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"form": asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Form":
        """The form of a recording."""
        return cls(**record["form"])


def chosen_form(
    model: nn.Module, samples: SampleSet, first: list[int], kind: str, layer: int | None
) -> tuple[Form, Head | None]:
    """The smallest form that holds what is asked for, found on one batch.

    Distributions are as well kept as the inputs of the head together with a copy of it, if logits are exactly
    `head(inputs)`: neither capped nor scaled, nor computed by anything but a plain linear layer.

    Args:
        model: the untouched model.
        samples: the set.
        first: positions of the batch to try.
        kind: `nll`, `distributions` or `block`.
        layer: of `block`.

    Returns:
        The form, and the head on the CPU where it belongs to it.
    """
    tokens = sum(sample.num_counted for sample in samples)
    batch = collate(samples, first)
    if kind != "distributions":
        row = record(model, batch, Form(kind, layer, 0, 0))[0]
        size = row.nbytes
        return Form(kind, layer, size, size * (len(samples) if kind == "nll" else tokens)), None
    inputs, logits, head = _head_at_work(model, batch)
    size = logits.shape[1] * torch.promote_types(logits.dtype, torch.float32).itemsize
    whole = Form("log-probabilities", None, size, size * tokens)
    if head is None or not torch.equal(head_logits(inputs, head).to(logits.dtype), logits):
        return whole, None
    size = inputs.shape[1] * inputs.element_size()
    total = size * tokens + sum(part.nbytes for part in head.values() if part is not None)
    if total >= whole.nbytes:
        return whole, None
    # A copy: the weights themselves may be about to change.
    kept = {name: None if part is None else part.to("cpu", copy=True) for name, part in head.items()}
    return Form("head-inputs", None, size, total), kept


def record(model: nn.Module, batch: Batch, form: Form) -> Tensor:
    """The rows of one batch, on the CPU: [B] for `nll`, else [N, columns]."""
    batch = batch.to(next(model.parameters()).device)
    with frozen(model), torch.no_grad():
        if form.name == "nll":
            rows = sample_losses(model, batch, "sum")
        elif form.name == "block":
            rows = answer_states(model, batch, form.layer)
        elif form.name == "head-inputs":
            rows = _head_at_work(model, batch)[0]
        else:
            logits, _ = answer_logits(model, batch)
            rows = torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return rows.cpu()


def head_logits(inputs: Tensor, head: Head) -> Tensor:
    """[N, H] -> [N, V], in the weight's dtype whatever autocast says: forward and backward pass are to agree."""
    with torch.autocast(inputs.device.type, enabled=False):
        return F.linear(inputs.to(head["weight"].dtype), head["weight"], head["bias"])


def _head_at_work(model: nn.Module, batch: Batch) -> tuple[Tensor | None, Tensor, Head | None]:
    """What the head took and gave at the answer tokens, [N, H] and [N, V], and the head itself; None unless plain."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    seen: list[Tensor] = []
    handle = None
    if type(head) is nn.Linear:
        handle = head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        with frozen(model), torch.no_grad():
            logits, _ = answer_logits(model, batch.to(next(model.parameters()).device))
    finally:
        if handle is not None:
            handle.remove()
    if len(seen) != 1 or seen[0].shape[:-1].numel() != logits.shape[0]:
        return None, logits, None
    parts: Head = {"weight": head.weight.detach(), "bias": None if head.bias is None else head.bias.detach()}
    return seen[0].reshape(logits.shape[0], -1), logits, parts
