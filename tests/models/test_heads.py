"""Heads: silencing a group changes exactly what removing that head from the attention would change.

The reference is the model itself: the input of every attention output projection is the heads' outputs side by side,
[..., heads * head_dim]. Changing the rows of one query (or key/value) head may change only the part of that
head (or of those that share it).
"""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fillm.models import catalogue, head_layout
from tests.families import FAMILIES, build_family, build_lora

HEADS, HEAD_DIM = 4, 8
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


def _is_output(name: str) -> bool:
    return any(part in _OUTPUTS for part in name.split("."))


def _heads_out(model, output_module):
    """The attention's output per head for a fixed input, [tokens, HEADS, HEAD_DIM]."""
    kept = []
    handle = output_module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return kept[0].reshape(-1, HEADS, HEAD_DIM).clone()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("qwen3-moe", "mistral", "llama-tied")])
def test_a_group_moves_only_its_head(family):
    model = build_family(family, dtype=torch.float64)
    infos = [i for i in catalogue(model) if i.layer == 0 and i.kind == "attn"]
    output = next(model.get_submodule(i.module) for i in infos if _is_output(i.module))
    before = _heads_out(model, output)
    checked = 0
    # olmo2 normalises queries and keys over all heads together: only its values are a head's own.
    inputs = [i for i in infos if not _is_output(i.module) and not (family == "olmo2" and "v_proj" not in i.name)]
    for info in inputs:
        layout = head_layout(model, info)
        assert layout is not None, info.name
        assert layout.index.shape == (info.shape[layout.axis],)
        assert sorted(layout.index.unique().tolist()) == list(range(layout.num_heads))
        tensor = model.get_parameter(info.name)
        shared = HEADS // (layout.num_heads if layout.labels[0].startswith("kv") else HEADS)
        for group, label in enumerate(layout.labels):
            saved = tensor.data.clone()
            noise = torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(group))
            tensor.data[_slices(layout, group)] += noise[_slices(layout, group)]
            moved = {h for h in range(HEADS) if not torch.equal(_heads_out(model, output)[:, h], before[:, h])}
            tensor.data = saved
            number = int(label.split()[1])
            if label.startswith("kv"):
                shared = HEADS // sum(other.startswith("kv") for other in layout.labels)
                expected = set(range(number * shared, (number + 1) * shared))
            else:
                expected = {number}
            # A key bias moves every score of a query alike, so softmax may leave no trace of it.
            assert moved == expected or ("k_proj.bias" in info.name and moved <= expected), (info.name, label)
            checked += 1
    assert checked >= 2


def _slices(layout, group):
    chosen = layout.index == group
    return (chosen,) if layout.axis == 0 else (slice(None), chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_projection_reads_heads_side_by_side(family):
    model = build_family(family)
    found = 0
    for info in catalogue(model):
        if info.kind == "attn" and _is_output(info.module):
            layout = head_layout(model, info)
            if len(info.shape) == 1:
                assert layout is None
                continue
            assert layout.axis == (0 if isinstance(model.get_submodule(info.module), Conv1D) else 1)
            assert layout.index.tolist() == [column // HEAD_DIM for column in range(HEADS * HEAD_DIM)]
            found += 1
    assert found == 2


def test_grouped_query_attention_counts():
    model = build_family("llama")
    layouts = {info.name: head_layout(model, info) for info in catalogue(model)}
    assert layouts["model.layers.0.self_attn.q_proj.weight"].labels == ("head 0", "head 1", "head 2", "head 3")
    assert layouts["model.layers.0.self_attn.k_proj.weight"].labels == ("kv 0", "kv 1")
    fused = build_family("phi3")
    info = next(i for i in catalogue(fused) if "qkv_proj" in i.name)
    assert head_layout(fused, info).labels == ("head 0", "head 1", "head 2", "head 3", "kv 0", "kv 1")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_tensors_have_no_heads(family):
    model = build_family(family)
    assert all(head_layout(model, info) is None for info in catalogue(model) if info.kind != "attn")


def test_lora_factors_on_the_heads_side():
    model = build_lora("llama", ["q_proj", "o_proj", "up_proj"])
    found = {
        info.name.removeprefix("base_model.model.model.layers.0."): layout
        for info in catalogue(model)
        if info.layer == 0 and (layout := head_layout(model, info)) is not None
    }
    assert found["self_attn.q_proj.lora_B.default.weight"].axis == 0
    assert found["self_attn.o_proj.lora_A.default.weight"].axis == 1
    assert found["self_attn.q_proj.base_layer.weight"].num_heads == HEADS
    assert not any("up_proj" in name or "q_proj.lora_A" in name or "o_proj.lora_B" in name for name in found)


def test_unknown_fused_layout_has_no_heads():
    model = build_family("gpt-neox")
    info = next(i for i in catalogue(model) if i.name.endswith("query_key_value.weight"))
    assert head_layout(model, info) is not None
    model.config.model_type = "falcon"
    assert head_layout(model, info) is None
