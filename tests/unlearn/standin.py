"""A stand-in for `fillm.Mask` that shares no code with it, made from booleans; and small models."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from fillm_kernels import Selection, select_bits, select_rows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass
class Entry:
    shape: tuple[int, ...]
    chosen: Tensor
    rows: Tensor | None = None
    bits: Tensor | None = None

    @property
    def count(self) -> int:
        return int(self.chosen.sum())

    def selection(self, device: torch.device) -> Selection:
        if self.bits is not None:
            return select_bits(self.bits.to(device), self.chosen.numel())
        rows = torch.arange(self.shape[0]) if self.rows is None else self.rows
        return select_rows(rows.to(device), self.shape)


def entry(chosen: Tensor, kind: str = "bits") -> Entry:
    """A `kind` (bits, rows, whole) of entry from a boolean tensor."""
    if kind == "whole":
        return Entry(tuple(chosen.shape), torch.ones_like(chosen))
    if kind == "rows":
        return Entry(tuple(chosen.shape), chosen, rows=chosen.view(chosen.shape[0], -1)[:, 0].nonzero()[:, 0])
    flat = [int(x) for x in chosen.flatten()] + [0] * (-chosen.numel() % 8)
    packed = [sum(bit << i for i, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)]
    return Entry(tuple(chosen.shape), chosen, bits=torch.tensor(packed, dtype=torch.uint8))


def random_mask(model: nn.Module, kinds: Mapping[str, str], share: float = 0.3) -> dict[str, Entry]:
    """About `share` of the weights or rows of the tensors that `kinds` names."""
    parameters, mask = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, kind in kinds.items():
        shape = parameters[name].shape
        if kind == "rows":
            rows = torch.rand(shape[0]) < share
            rows[0] = True
            chosen = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
        else:
            chosen = torch.rand(shape) < share
        mask[name] = entry(chosen, kind)
    return mask


def booleans(model: nn.Module, mask: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Whether each weight of each parameter is selected."""
    return {
        name: mask[name].chosen if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        for name, p in model.named_parameters()
    }


def llama(layers: int = 4, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers of odd sizes, about 6 thousand weights: more than one block of a prefix count."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(13, 67), nn.Tanh(), nn.Linear(67, 71), nn.Tanh(), nn.Linear(71, 5)).to(dtype)


NET_KINDS = {"0.weight": "bits", "0.bias": "rows", "2.weight": "bits", "2.bias": "whole", "4.weight": "rows"}
