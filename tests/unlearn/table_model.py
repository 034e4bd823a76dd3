"""A model whose next-token logits depend on the last token alone, so that every probability can be looked up."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fillm.data import Sample, SampleSet


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, h: Tensor) -> Tensor:
        return self.factor * h


class TableModel(nn.Module):
    """Token -> one-hot vector -> two blocks that scale it -> head.

    Args:
        logits: [V, V], row i what follows token i.
        scales: of the two blocks; the head divides by their product.
    """

    def __init__(self, logits: Tensor, scales: tuple[float, float] = (2.0, 3.0)) -> None:
        super().__init__()
        size = len(logits)
        self.embed = nn.Embedding.from_pretrained(torch.eye(size), freeze=True)
        self.layers = nn.ModuleList(Scale(scale) for scale in scales)
        self.head = nn.Linear(size, size, bias=False)
        self.head.weight.data = logits.T.clone() / (scales[0] * scales[1])
        self.to(logits.dtype)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return SimpleNamespace(logits=self.head(h))


def sample_set(*rows: tuple[Sequence[int], int]) -> SampleSet:
    """Samples from (tokens, number of tokens of the prompt)."""
    samples = [
        Sample(f"rows#{number}", tuple(tokens), tuple([-100] * prompt + list(tokens[prompt:])))
        for number, (tokens, prompt) in enumerate(rows)
    ]
    return SampleSet(samples, "rows")
