"""The catalogue: every tensor of every family, once, with its kind, block, ties, experts and adapters."""

import fnmatch

import pytest
import torch
from torch import nn

from fillm.errors import UsageError
from fillm.models import KINDS, catalogue, select_tensors
from tests.families import FAMILIES, build_family, build_lora

# Written out by hand per family, independently of the rules under test: glob on the name -> kind.
_LLAMA = {
    "model.embed_tokens.weight": "embed",
    "model.layers.*.self_attn.[qkvo]_proj.*": "attn",
    "model.layers.*.self_attn.[qk]_norm.weight": "norm",
    "model.layers.*.mlp.*_proj.*": "mlp",
    "model.layers.*_layernorm.weight": "norm",
    "model.layers.*.input_layernorm.weight": "norm",
    "model.norm.weight": "norm",
    "lm_head.weight": "lm_head",
}
_MOE = {
    **{glob: kind for glob, kind in _LLAMA.items() if ".mlp." not in glob},
    "model.layers.*.mlp.gate.weight": "mlp",
    "model.layers.*.mlp.experts.*_proj": "expert",
}
EXPECTED = {
    **dict.fromkeys(("llama", "llama-tied", "llama-bias", "qwen2", "qwen3", "mistral", "gemma2", "olmo2"), _LLAMA),
    "mixtral": _MOE,
    "qwen3-moe": _MOE,
    "phi": {
        **_LLAMA,
        "model.layers.*.self_attn.dense.*": "attn",
        "model.layers.*.mlp.fc[12].*": "mlp",
        "model.*layernorm.bias": "norm",
        "model.final_layernorm.*": "norm",
        "lm_head.bias": "lm_head",
    },
    "phi3": {
        **_LLAMA,
        "model.layers.*.self_attn.qkv_proj.weight": "attn",
        "model.layers.*.mlp.gate_up_proj.weight": "mlp",
    },
    "gpt2": {
        "transformer.wte.weight": "embed",
        "transformer.wpe.weight": "embed",
        "transformer.h.*.ln_[12].*": "norm",
        "transformer.ln_f.*": "norm",
        "transformer.h.*.attn.c_*": "attn",
        "transformer.h.*.mlp.c_*": "mlp",
    },
    "gpt-neox": {
        "gpt_neox.embed_in.weight": "embed",
        "gpt_neox.*layernorm.*": "norm",
        "gpt_neox.final_layer_norm.*": "norm",
        "gpt_neox.layers.*.attention.*": "attn",
        "gpt_neox.layers.*.mlp.*": "mlp",
        "lm_head.weight": "lm_head",
    },
    "opt": {
        "model.decoder.embed_*.weight": "embed",
        "model.decoder.layers.*.self_attn.*_proj.*": "attn",
        "model.decoder.*layer_norm.*": "norm",
        "model.decoder.layers.*.fc[12].*": "mlp",
    },
}


def _expected_kind(family: str, name: str) -> str:
    kinds = {kind for glob, kind in EXPECTED[family].items() if fnmatch.fnmatchcase(name, glob)}
    assert len(kinds) == 1, (name, kinds)
    return kinds.pop()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_once_with_its_kind_and_layer(family):
    model = build_family(family)
    infos = catalogue(model)
    parameters = dict(model.named_parameters())
    assert [info.name for info in infos] == list(parameters)
    for info in infos:
        assert info.kind == _expected_kind(family, info.name), info.name
        digits = [int(part) for part in info.name.split(".") if part.isdecimal()]
        assert info.layer == (digits[0] if digits else -1), info.name
        assert info.shape == tuple(parameters[info.name].shape)
        assert info.numel == parameters[info.name].numel()
        assert info.expert == (4 if info.kind == "expert" else 0)
        assert not info.lora
        assert getattr(model.get_submodule(info.module), info.name.rsplit(".", 1)[1]) is parameters[info.name]


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "gpt2", "opt"])
def test_tied_head_is_listed_under_the_embedding(family):
    infos = catalogue(build_family(family))
    tied = [info for info in infos if info.tied]
    assert [info.kind for info in tied] == ["embed"]
    assert tied[0].tied == ("lm_head.weight",)


def test_lora_model():
    model = build_lora("llama", ["q_proj", "down_proj", "embed_tokens"])
    infos = {info.name: info for info in catalogue(model)}
    assert list(infos) == [name for name, _ in model.named_parameters()]
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert infos[f"{prefix}.base_layer.weight"].kind == "attn"
    for factor in ("lora_A", "lora_B"):
        info = infos[f"{prefix}.{factor}.default.weight"]
        assert (info.kind, info.layer, info.lora) == ("lora", 1, True)
    assert infos["base_model.model.model.embed_tokens.base_layer.weight"].kind == "embed"
    assert infos["base_model.model.model.embed_tokens.lora_embedding_A.default"].kind == "lora"
    assert infos["base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"].kind == "mlp"
    assert infos["base_model.model.lm_head.weight"].kind == "lm_head"
    assert sum(info.lora for info in infos.values()) == 2 * (2 * 2 + 1)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)])
        self.shared_expert = nn.Linear(3, 3, bias=False)
        self.ln_1 = nn.LayerNorm(3)
        self.mixer = nn.Linear(3, 3, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))


def test_separate_experts_shared_expert_and_unknown_tensors():
    model = nn.Sequential()
    model.add_module("blocks", nn.ModuleList([_Block(), _Block()]))
    infos = {info.name: info for info in catalogue(model)}
    expert = infos["blocks.1.experts.0.weight"]
    assert (expert.kind, expert.layer, expert.expert) == ("expert", 1, 1)
    assert infos["blocks.0.shared_expert.weight"].kind == "mlp"
    assert infos["blocks.0.ln_1.bias"].kind == "norm"
    assert infos["blocks.0.mixer.weight"].kind == "other"
    assert infos["blocks.0.gate"].shape == ()


def test_catalogue_reads_no_values():
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    assert [info.layer for info in catalogue(model)] == [0, 0]


def test_select_by_kind_and_glob():
    infos = catalogue(build_family("llama"))
    names = [info.name for info in infos]
    assert select_tensors(infos) == infos
    assert [i.name for i in select_tensors(infos, "mlp")] == [n for n in names if ".mlp." in n]
    assert [i.name for i in select_tensors(infos, "attn, *up_proj*", "*.1.*")] == [
        n for n in names if (".self_attn." in n or "up_proj" in n) and ".1." not in n
    ]
    assert [i.name for i in select_tensors(infos, None, "mlp,attn,norm")] == [names[0], names[-1]]
    assert select_tensors(infos, exclude="expert") == infos
    assert {info.kind for info in infos} <= set(KINDS)


def test_select_matches_a_tied_name():
    infos = catalogue(build_family("llama-tied"))
    assert [i.name for i in select_tensors(infos, "lm_head.weight")] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        ("*nothing*", None, "--include *nothing*: matches no tensor"),
        ("mlp,expert", None, "--include expert: matches no tensor"),
        (None, "layers.9", "--exclude layers.9: matches no tensor"),
        ("norm", "*norm*", "leaves none"),
    ],
)
def test_select_names_what_matches_nothing(include, exclude, said):
    with pytest.raises(UsageError) as caught:
        select_tensors(catalogue(build_family("llama")), include, exclude)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
