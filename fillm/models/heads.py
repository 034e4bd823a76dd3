"""Which rows or columns of an attention tensor belong to which head."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fillm.models.catalogue import TensorInfo

_QUERY = frozenset({"q_proj", "query", "wq"})
_KEY_VALUE = frozenset({"k_proj", "v_proj", "key", "value", "wk", "wv"})
_OUTPUT = frozenset({"o_proj", "out_proj", "dense", "c_proj", "wo"})
# Fused layouts are only trusted where they are known: the same name means another order in other families.
_INTERLEAVED = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"})
_CONCATENATED = frozenset({"phi3", "phi4_multimodal"})


@dataclass(frozen=True)
class HeadLayout:
    """The groups of rows or columns of one tensor, a group being what one attention head owns of it.

    Attributes:
        axis: 0 if heads are groups of rows, 1 if of columns.
        index: the group of every row or column, [shape[axis]], int64, each in 0 .. len(labels) - 1.
        labels: what each group is: `head 3` for a query head (with its own key and value where they are in the same
            tensor), `kv 1` for a key/value head that several query heads share.
    """

    axis: int
    index: Tensor
    labels: tuple[str, ...]

    @property
    def num_heads(self) -> int:
        """The number of groups."""
        return len(self.labels)


def head_layout(model: nn.Module, info: TensorInfo) -> HeadLayout | None:
    """How the heads lie in one tensor of `model`.

    Query projections have one group a query head, key and value projections one a key/value head (fewer under
    grouped-query attention), output projections one group of input columns a query head. Fused query-key-value tensors:
    GPT-2's `c_attn` (thirds; a head owns a piece of each), GPT-NeoX's and Bloom's `query_key_value` ([heads, 3, head
    dim]), Phi-3's `qkv_proj` (all query heads, then keys, then values; a key/value head owns its key and value rows).
    Of a LoRA pair the factor on the heads' side has a layout.

    Args:
        model: the model the catalogue was made from.
        info: one of its tensors.

    Returns:
        The layout; `None` for tensors that are not split by head (no attention tensor, norms, output biases) and for
        fused layouts this function does not know.
    """
    path = info.module.split(".")
    factor = next((part for part in path if part.startswith("lora_")), None)
    if factor not in (None, "lora_A", "lora_B") or not (info.kind == "attn" or (info.lora and _in_attention(path))):
        return None
    projection = path[path.index(factor) - 1] if factor else ([p for p in path if p != "base_layer"] or [""])[-1]
    owner = model.get_submodule(info.module)
    transposed = isinstance(owner, Conv1D) and len(info.shape) == 2
    if projection in _OUTPUT:
        if len(info.shape) != 2 or factor == "lora_B":
            return None
        axis = 0 if transposed else 1
    else:
        if factor == "lora_A":
            return None
        axis = 1 if transposed else 0
    groups = _groups(
        model, projection, info.shape[axis], fused_thirds=projection == "c_attn" and _is_conv1d(model, path)
    )
    return None if groups is None else HeadLayout(axis, *groups)


def _in_attention(path: list[str]) -> bool:
    return any("attn" in part or "attention" in part for part in path)


def _is_conv1d(model: nn.Module, path: list[str]) -> bool:
    """Whether the projection is a `Conv1D`, itself or under a LoRA layer: GPT-2's `c_attn`, not GPT-BigCode's."""
    where = path[: path.index("c_attn") + 1]
    module = model.get_submodule(".".join(where))
    return isinstance(getattr(module, "base_layer", module), Conv1D)


def _head_counts(model: nn.Module) -> tuple[int, int] | None:
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None)
    shared = getattr(text, "num_key_value_heads", None) or heads
    return (heads, shared) if isinstance(heads, int) and isinstance(shared, int) else None


def _groups(model: nn.Module, projection: str, size: int, fused_thirds: bool) -> tuple[Tensor, tuple[str, ...]] | None:
    counts = _head_counts(model)
    if counts is None:
        return None
    heads, shared = counts
    each = tuple(f"head {head}" for head in range(heads))
    if projection in _QUERY or projection in _OUTPUT:
        return (_blocks(size, heads), each) if size % heads == 0 else None
    if projection in _KEY_VALUE:
        labels = each if shared == heads else tuple(f"kv {head}" for head in range(shared))
        return (_blocks(size, shared), labels) if size % shared == 0 else None
    family = re.sub(r"_text$", "", str(getattr(model.config, "model_type", "")))
    if fused_thirds and size % (3 * heads) == 0:
        return _blocks(size // 3, heads).repeat(3), each
    if projection == "query_key_value" and family in _INTERLEAVED and size % (3 * heads) == 0:
        return _blocks(size, heads), each
    if projection == "qkv_proj" and family in _CONCATENATED and size % (heads + 2 * shared) == 0:
        head_dim = size // (heads + 2 * shared)
        keys = _blocks(shared * head_dim, shared)
        if shared == heads:
            return torch.cat([keys, keys, keys]), each
        both = each + tuple(f"kv {head}" for head in range(shared))
        return torch.cat([_blocks(heads * head_dim, heads), heads + keys, heads + keys]), both
    return None


def _blocks(size: int, count: int) -> Tensor:
    """`count` equal runs of 0, 1, 2, ...: [size]."""
    return torch.arange(count).repeat_interleave(size // count)
