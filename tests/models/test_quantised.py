"""Base weights of 4 and 8 bits (bitsandbytes), which take no gradient, under adapters that do."""

import json
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import fillm
from fillm.capture import Capture, verify
from fillm.errors import ModelError
from fillm.models import catalogue, load_model
from fillm.rank.__main__ import main
from tests.capture.reference import reference_gradients
from tests.rank.direct import FORGET, FORGET_ROWS, RETAIN, RETAIN_ROWS, Direct

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:MatMul8bitLt:UserWarning")
KINDS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}
ADAPTED = ["q_proj", "v_proj", "down_proj"]


def plain_model() -> nn.Module:
    """A Llama whose matrices are of whole blocks of 64."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2)
    )  # fmt: skip


def with_adapters(model: nn.Module) -> nn.Module:
    """Both factors drawn, so that neither's gradient is zero."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=ADAPTED, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    return wrapped.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as it was, packed in both ways, and an adapter."""
    root = tmp_path_factory.mktemp("quantised")
    found = {"plain": root / "plain", "adapter": root / "adapter"}
    plain_model().save_pretrained(found["plain"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with_adapters(plain_model()).save_pretrained(found["adapter"])
    for kind, settings in KINDS.items():
        found[kind] = root / kind
        packed = AutoModelForCausalLM.from_pretrained(
            found["plain"], quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
        )
        packed.save_pretrained(found[kind])
    return found


def loaded(folders: dict[str, Path], kind: str) -> nn.Module:
    model = load_model(str(folders[kind]), adapter=str(folders["adapter"]), device="cpu")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # there the library takes a product in bfloat16 where it can
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_not_listed_and_the_others_have_exact_gradients(kind, folders):
    model = loaded(folders, kind)
    packed = {name for name, p in model.named_parameters() if not p.is_floating_point()}
    names = [info.name for info in catalogue(model)]
    assert len(packed) == 14 and not packed & set(names)
    assert {info.kind for info in catalogue(model)} == {"lora", "norm", "embed", "lm_head"}
    capture = Capture(model, names)
    found = verify(capture, RETAIN)
    assert not capture.fallback and not found.unreached
    # A step of an activation's 8-bit grid that rounding moves is 1/127 of the row's largest: batches may differ by it.
    assert max(found.error.values()) <= (1e-5 if kind == "4bit" else 2e-2)
    assert kind == "8bit" or not capture.alone


def test_a_ranking_over_4_bits_is_that_of_the_unpacked_weights_in_float64(folders):
    import bitsandbytes

    ranking = fillm.rank_parameters(loaded(folders, "4bit"), None, FORGET_ROWS, RETAIN_ROWS, include="lora")
    unpacked = with_adapters(load_model(str(folders["plain"]), device="cpu"))
    packed = dict(loaded(folders, "4bit").named_parameters())
    for name, parameter in unpacked.named_parameters():
        if not packed[name].is_floating_point():
            weight = bitsandbytes.functional.dequantize_4bit(packed[name].data, packed[name].quant_state)
            assert 0.01 < float((weight - parameter).norm() / parameter.norm()) < 0.2  # it is not the weight it was
            parameter.data = weight.to(parameter.dtype)
    adapters = [name for name, _ in unpacked.named_parameters() if "lora_" in name]
    f, g = (reference_gradients(unpacked, samples) for samples in (FORGET, RETAIN))
    wanted = Direct(f, g)
    assert sorted(ranking.scores) == sorted(adapters)
    for name in adapters:
        # float32 through two layers; the true `u` is what is left of v and w
        assert ranking.scores[name] == pytest.approx(float(wanted.u[name].norm()), rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_ranks_adapters_over_packed_weights(kind, folders, tmp_path):
    for name, rows in (("forget", FORGET_ROWS), ("retain", RETAIN_ROWS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--model",
        str(folders[kind]),
        "--adapter",
        str(folders["adapter"]),
        "--include",
        "lora",
        "--device",
        "cpu",
    ]
    data = ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")]
    assert main([*words, *data, "--out", str(tmp_path / "run")]) == 0
    ranking = fillm.Ranking.load(tmp_path / "run")
    assert len(ranking) == 12 and all("lora_" in name for name in ranking.names)


def test_without_bitsandbytes_a_packed_model_is_refused_in_a_line(folders, monkeypatch):
    quantiser = sys.modules["transformers.quantizers.quantizer_bnb_4bit"]
    monkeypatch.setattr(transformers.utils.import_utils, "is_bitsandbytes_available", lambda *_: False)
    monkeypatch.setattr(quantiser, "is_bitsandbytes_available", lambda *_: False, raising=False)
    with pytest.raises(ModelError, match="bitsandbytes"):
        load_model(str(folders["4bit"]), device="cpu")
