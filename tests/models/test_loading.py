"""Loading models, adapters and tokenizers, and the one line each mistake gets."""

import gc
import json
import pickle
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fillm.errors import ModelError
from fillm.models import load_model, load_tokenizer, model_fingerprint, resolve_device
from tests.families import FAMILIES, build_family, build_lora


@pytest.fixture
def folder(tmp_path):
    build_family("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def _refused(model, **options):
    with pytest.raises(ModelError) as caught:
        load_model(str(model), device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_loads_the_saved_weights(folder, capfd):
    model = load_model(str(folder), device="cpu")
    expected = build_family("llama").state_dict()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_whole(family, tmp_path):
    saved = build_family(family)
    saved.save_pretrained(tmp_path)
    assert model_fingerprint(load_model(str(tmp_path), device="cpu")) == model_fingerprint(saved)


def test_tied_model_stays_tied(tmp_path):
    build_family("gpt2").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_dtype(folder, tmp_path):
    assert load_model(str(folder), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    build_family("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_model(str(tmp_path / "half"), dtype="auto", device="cpu").dtype == torch.bfloat16
    assert load_model(str(tmp_path / "half"), device="cpu").dtype == torch.float32
    assert "--dtype int8" in _refused(folder, dtype="int8")


def test_settings_of_transformers_are_left_as_they_were(folder):
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(str(folder), device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_no_such_folder(tmp_path):
    assert _refused(tmp_path / "nowhere").endswith("nowhere: no such folder")


def test_a_name_the_hub_does_not_give(offline):
    assert "no such folder, and the Hub does not give it" in _refused("nobody/no-such-model")


def test_a_file_is_not_a_folder(folder):
    assert "is a file" in _refused(folder / "model.safetensors")


def test_folder_without_config(tmp_path):
    assert "no config.json" in _refused(tmp_path)


def test_an_adapter_given_as_the_model(tmp_path):
    build_lora("llama", ["q_proj"]).save_pretrained(tmp_path)
    assert "give its base as --model" in _refused(tmp_path)
    with pytest.raises(ModelError, match="give its base as --model"):
        load_tokenizer(str(tmp_path))  # what the commands ask for first


def test_pickled_weights_are_refused_unread(folder):
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (sys.exit, ("a pickle was loaded",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "only pickled weights (pytorch_model.bin)" in _refused(folder)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no weights" in _refused(folder)


@pytest.mark.parametrize("keep", [0, 7, 200, -5])
def test_damaged_weights_name_the_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged weights in model.safetensors" in _refused(folder)


def test_a_missing_tensor_is_never_filled_with_random_numbers(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in _refused(folder)


def test_a_tensor_of_another_shape(folder):
    _edit_config(folder, vocab_size=101)
    assert "embed_tokens" in _refused(folder)


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    assert str(folder) in _refused(folder)


def test_not_a_causal_language_model(folder, tmp_path):
    _edit_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "T5ForConditionalGeneration is not a causal language model" in _refused(folder)
    _edit_config(folder, model_type="bert", architectures=["BertForMaskedLM"])
    assert "BertForMaskedLM is not a causal language model" in _refused(folder)


def test_unknown_model_type(folder):
    _edit_config(folder, model_type="nobody_knows")
    assert "nobody_knows" in _refused(folder)


def test_remote_code_is_refused_by_default(folder):
    marker = folder / "was_run"
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    _edit_config(folder, model_type="theirs", auto_map=auto_map)
    assert "--trust-remote-code" in _refused(folder)
    assert not marker.exists()


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("cuda:97", "tpu", "meta", ""):
        with pytest.raises(ModelError, match="--device"):
            resolve_device(wrong)


def test_adapter(folder, tmp_path):
    wrapped = build_lora("llama", ["q_proj", "down_proj"])
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(folder), adapter=str(tmp_path / "adapter"), device="cpu")
    ids = torch.arange(5, 14)[None]
    logits = wrapped(input_ids=ids).logits
    assert torch.allclose(loaded(input_ids=ids).logits, logits, atol=1e-5)
    assert not torch.allclose(load_model(str(folder), device="cpu")(input_ids=ids).logits, logits, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_adapter_mistakes(folder, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    build_lora("llama", ["q_proj"]).save_pretrained(adapter)
    assert "no such folder" in _refused(folder, adapter=str(tmp_path / "missing"))
    weights = load_file(adapter / "adapter_model.safetensors")
    first = min(weights)
    save_file({**weights, first: torch.zeros(3, 5)}, adapter / "adapter_model.safetensors")
    assert "does not fit the model" in _refused(folder, adapter=str(adapter))
    save_file({name: value for name, value in weights.items() if name != first}, adapter / "adapter_model.safetensors")
    assert "does not fit the model" in _refused(folder, adapter=str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "safetensors only" in _refused(folder, adapter=str(adapter))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "needs the package peft" in _refused(folder, adapter=str(adapter))


def test_tokenizer(folder, tmp_path, offline):
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"^--tokenizer \S+empty: holds no tokenizer .*; give a folder with one"):
        load_tokenizer(str(tmp_path / "empty"), option="--tokenizer")
    with pytest.raises(ModelError, match="no config.json in it; not a model's folder"):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no config.json in it \(there is one in \S+run/model: give that\)"):
        load_tokenizer(str(tmp_path / "run"))
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="the Hub does not give it"):
        load_tokenizer("nobody/no-such-tokenizer")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    assert load_tokenizer(str(folder))("a").input_ids == [1]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="model"):
        load_tokenizer(str(folder))


def test_fingerprint_follows_weights_and_nothing_else(folder):
    model = build_family("llama")
    mark = model_fingerprint(model)
    assert len(mark) == 64
    assert model_fingerprint(load_model(str(folder), device="cpu")) == mark
    assert model_fingerprint(model.train()) == mark
    strided = model.model.layers[0].mlp.up_proj.weight
    strided.data = strided.data.t().contiguous().t()
    assert model_fingerprint(model) == mark
    strided.data[0, 0] = torch.nextafter(strided.data[0, 0], torch.tensor(9.0))
    assert model_fingerprint(model) != mark
    assert model_fingerprint(build_family("llama", dtype=torch.bfloat16)) != mark


def test_fingerprint_in_pieces_is_the_same(monkeypatch):
    model = build_family("qwen2")
    mark = model_fingerprint(model)
    monkeypatch.setattr("fillm.models.fingerprint._PIECE_BYTES", 100)
    assert model_fingerprint(model) == mark


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to tell what the process holds")
def test_a_tokenizer_that_was_used_leaves_nothing_behind(tmp_path: Path) -> None:
    """A process that loads one for every run must not grow with them: here it was 0.4 MB for each."""
    words = [f"{word:x}" for word in range(100_000, 140_000, 10)]
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate("0123456789abcdef")}, []))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path)

    def use(times: int) -> int:
        for _ in range(times):
            load_tokenizer(str(tmp_path))(words)
        gc.collect()
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))

    before = use(3)
    assert use(20) - before < 2048  # KiB
