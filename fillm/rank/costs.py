"""FLOP and bytes of the passes, from shapes alone (docs/method.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fillm.data import SampleSet, plan_batches
from fillm.models import TensorInfo
from fillm.rank.plan_devices import Devices
from fillm.statistics import EXPANSION_NUMEL, EXPANSION_TERMS


@dataclass(frozen=True)
class BatchShape:
    """One batch: R rows of T tokens, of which the head sees those that predict an answer token.

    Attributes:
        rows: R.
        width: T, padding included.
        lengths: tokens of each sample.
        answers: tokens of each sample that count in the loss.
    """

    rows: int
    width: int
    lengths: tuple[int, ...]
    answers: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """R T, padding included."""
        return self.rows * self.width

    @property
    def answered(self) -> int:
        """Tokens that the head sees."""
        return sum(self.answers)


def batch_shapes(samples: SampleSet, tokens_per_batch: int | None, layout: str) -> list[BatchShape]:
    """The batches of one pass over `samples`, as `fillm.data.plan_batches` makes them.

    Args:
        samples: tokenised samples.
        tokens_per_batch: budget, padding included.
        layout: `right`, `left` or `packed`.
    """
    shapes = []
    lengths = [sample.num_tokens for sample in samples]
    for members in plan_batches(lengths, tokens_per_batch):
        longest, total = max(lengths[i] for i in members), sum(lengths[i] for i in members)
        rows, width = (1, total) if layout == "packed" else (len(members), longest)
        answers = tuple(samples[i].num_counted for i in members)
        shapes.append(BatchShape(rows, width, tuple(lengths[i] for i in members), answers))
    return shapes


@dataclass(frozen=True)
class Costs:
    """What a token costs in one model.

    Attributes:
        body: weights that every token is multiplied with, head and look-ups not counted; of experts the routed part.
        head: weights of the output embedding.
        scoped_body, scoped_head: the part of each that is in scope.
        attention: sum over layers of heads times head size.
        scoped_shapes: (inputs, outputs, use, is head) of every matrix in scope; `use` is 1, or the expected part of the
            tokens that an expert sees, then with one entry per expert.
    """

    body: float
    head: float
    scoped_body: float
    scoped_head: float
    attention: float
    scoped_shapes: tuple[tuple[int, int, float, bool], ...]

    @classmethod
    def of(cls, model: nn.Module, everything: Sequence[TensorInfo], scope: Sequence[TensorInfo]) -> "Costs":
        """Reads off a model's tensors and configuration; values are not touched."""
        settings = _text_config(model)
        output = getattr(model, "get_output_embeddings", lambda: None)()
        parameters = dict(model.named_parameters())
        head_id = id(output.weight) if output is not None and hasattr(output, "weight") else None
        chosen = {info.name for info in scope}
        sums = {"body": 0.0, "head": 0.0, "scoped_body": 0.0, "scoped_head": 0.0}
        shapes: list[tuple[int, int, float, bool]] = []
        for info in everything:
            is_head = id(parameters[info.name]) == head_id
            if len(info.shape) < 2 or (info.kind == "embed" and not is_head):
                continue
            use = _routed_part(settings, info)
            part = "head" if is_head else "body"
            sums[part] += info.numel * use
            if info.name in chosen:
                sums[f"scoped_{part}"] += info.numel * use
                stack = info.shape[0] if len(info.shape) == 3 else 1
                shapes += [(info.shape[-1], info.shape[-2], use, is_head)] * stack
        return cls(**sums, attention=_attention_width(settings), scoped_shapes=tuple(shapes))

    def forward(self, shape: BatchShape) -> float:
        """2 FLOP per weight and token; the backward of the activations takes as many again."""
        return self.layers_forward(shape) + 2.0 * self.head * shape.answered

    def layers_forward(self, shape: BatchShape) -> float:
        """Without the head: what gradient checkpointing computes twice."""
        return 2.0 * self.body * shape.rows * shape.width

    def attention_forward(self, shape: BatchShape) -> float:
        """Scores and their product with the values; the backward takes twice as many."""
        return 4.0 * self.attention * shape.rows * shape.width**2

    def product(self, shape: BatchShape) -> float:
        """One product over the weights in scope, (5) or (6): 2 FLOP per weight and token."""
        return 2.0 * (self.scoped_body * shape.rows * shape.width + self.scoped_head * shape.answered)

    def factor_entries(self, shape: BatchShape) -> float:
        """Entries of the inputs and output gradients of every matrix in scope."""
        body, head = shape.rows * shape.width, shape.answered
        return sum(use * (head if at_head else body) * (i + o) for i, o, use, at_head in self.scoped_shapes)

    def ghost_norms(self, shape: BatchShape) -> float:
        """Equation (4): `T_b^2 (I + O)`, or `2 T_b I O` for samples so long that this is less."""
        total = 0.0
        for inputs, outputs, use, is_head in self.scoped_shapes:
            for length in shape.answers if is_head else shape.lengths:
                tokens = length * use
                total += min(tokens * tokens * (inputs + outputs), 2.0 * tokens * inputs * outputs)
        return total

    def gram_matrices(self, sets: Sequence[Sequence[BatchShape]]) -> tuple[int, float]:
        """Bytes of the gradients that exact Gram matrices keep, in the smaller of two forms, and FLOP of the products.

        Of `n` samples of `N` tokens together: factors of `N (I + O)` numbers, or `n I O` entries; by ghost Gram matrix
        `2 N^2 (I + O)` FLOP, or `2 N I O` to form the gradients and `2 n^2 I O` to multiply them.
        """
        shapes = [shape for batches in sets for shape in batches]
        samples = sum(shape.rows for shape in shapes)
        kept, flop = 0.0, 0.0
        for inputs, outputs, use, is_head in self.scoped_shapes:
            tokens = use * sum(shape.answered if is_head else shape.rows * shape.width for shape in shapes)
            kept += 4.0 * min(tokens * (inputs + outputs), float(samples * inputs * outputs))
            formed = 2.0 * tokens * inputs * outputs + 2.0 * samples**2 * inputs * outputs
            flop += min(2.0 * tokens**2 * (inputs + outputs), formed)
        return int(kept), flop


_ONE = Devices()


def accumulator_bytes(
    scope: Sequence[TensorInfo], itemsize: int, expanded: bool = False, devices: Devices = _ONE
) -> int:
    """Bytes of one accumulator a tensor; with `expanded`, of the weighted sums and their higher terms.

    Args:
        scope: tensors.
        itemsize: 4, or 8 for a float64 model.
        expanded: small tensors carry the terms of the expansion in `lambda` (docs/method.md).
        devices: of which one is asked for.
    """
    terms = 1 + EXPANSION_TERMS if expanded else 1
    return sum(itemsize * devices.held(i.shape) * (terms if i.numel <= EXPANSION_NUMEL else 1) for i in scope)


def estimated_activation_bytes(model: nn.Module, infos: Sequence[TensorInfo], rows: int, tokens: int) -> int:
    """What autograd keeps, from shapes: every matrix' input and output, every norm's, and the attention matrices."""
    itemsize = next(iter(model.parameters())).element_size()
    settings = _text_config(model)
    width = 0.0
    for info in infos:
        if info.kind == "embed":
            continue
        width += sum(info.shape[-2:]) * _routed_part(settings, info) * max(1, info.expert)
    heads = getattr(settings, "num_attention_heads", 0) or 0
    layers = getattr(settings, "num_hidden_layers", 0) or 0
    return int(itemsize * rows * (width * tokens + 2.0 * layers * heads * tokens**2))


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _routed_part(settings: Any, info: TensorInfo) -> float:
    """The part of the tokens that an expert's weights see, with routing spread evenly; 1 for everything else."""
    if info.kind != "expert":
        return 1.0
    chosen = getattr(settings, "num_experts_per_tok", None) or getattr(settings, "num_experts_per_token", None)
    experts = next(
        (
            getattr(settings, n)
            for n in ("num_local_experts", "num_experts", "n_routed_experts")
            if hasattr(settings, n)
        ),
        None,
    )
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def _attention_width(settings: Any) -> float:
    heads = getattr(settings, "num_attention_heads", None)
    layers = getattr(settings, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return 0.0
    size = getattr(settings, "head_dim", None) or getattr(settings, "hidden_size", 0) // heads
    return float(layers * heads * size)
