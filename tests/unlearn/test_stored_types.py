"""Weights as the files hold them: what is outside the mask keeps value and type, whatever config.json says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fillm
from fillm.errors import UsageError
from fillm.models import load_model, stored_dtypes
from tests.unlearn.conftest import save_model

TRAINED = "model.layers.1.mlp.up_proj.weight"


def stored(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture
def mask(tmp_path, model_folder):
    """A mask of one tensor, of any model of these shapes."""
    path = tmp_path / "whole.safetensors"
    fillm.Mask.whole(load_model(model_folder, device="cpu"), [TRAINED]).save(path)
    return str(path)


def with_config_type(folder, dtype):
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return folder


def mixed_model(folder):
    """Matrices in bfloat16, norms in float32 that bfloat16 would round."""
    save_model(folder, dtype=torch.bfloat16)
    weights = {name: v.float() + 1e-4 if v.ndim == 1 else v for name, v in stored(folder).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def assert_kept(start, after):
    """All but the trained tensor as it was, by the files."""
    before, now = stored(start), stored(after)
    assert before.keys() == now.keys()
    for name, value in before.items():
        assert value.dtype == now[name].dtype, name
        assert torch.equal(value, now[name]) == (name != TRAINED), name


@pytest.mark.parametrize(("saved", "said"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_a_config_that_names_another_type(saved, said, unlearn, mask, tmp_path):
    start = with_config_type(save_model(tmp_path / "model", dtype=getattr(torch, saved)), said)
    folder = unlearn("run", model=start, mask=mask)
    assert_kept(start, folder / "model")
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == saved


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_file_of_two_types(dtype, unlearn, mask, tmp_path):
    start = mixed_model(tmp_path / "model")
    folder = unlearn("run", model=start, mask=mask, dtype=dtype)
    assert_kept(start, folder / "model")
    types = [json.loads((Path(one) / "config.json").read_text())["dtype"] for one in (start, folder / "model")]
    assert types == ["bfloat16", "bfloat16"]


def test_a_narrower_type_than_the_widest_is_refused(unlearn, mask, tmp_path):
    with pytest.raises(UsageError, match="layernorm.weight was saved in float32; rounding would change weights"):
        unlearn("run", model=mixed_model(tmp_path / "model"), mask=mask, dtype="bfloat16")


def test_types_are_read_from_all_shards(tmp_path, model_folder):
    load_model(model_folder, device="cpu").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert stored_dtypes(str(tmp_path / "shards")) == stored_dtypes(model_folder) != {}
    assert set(stored_dtypes(model_folder).values()) == {torch.float32}


def test_headers_that_cannot_be_read_are_left_to_loading(tmp_path):
    assert stored_dtypes(str(tmp_path)) == {}
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert stored_dtypes(str(tmp_path)) == {}


def test_steps_that_what_is_saved_rounds_away_are_none(unlearn, tmp_path, capsys):
    """Widened weights moved, but by less than the type they are saved in can tell."""
    start = save_model(tmp_path / "narrow", dtype=torch.bfloat16)
    mask = fillm.Mask.whole(load_model(start, device="cpu"), ["model.norm.weight"])
    mask.save(tmp_path / "norm.safetensors")
    given = {"model": start, "mask": str(tmp_path / "norm.safetensors"), "dtype": "float32"}
    folder = unlearn("run", **given, lr=1e-6)
    told = json.loads((folder / "verification.json").read_text())
    assert told["changed_parameters"] == 0 and not told["mask_applied"]
    assert told["forget_loss"]["before"] == told["forget_loss"]["after"]
    assert "no selected weight has changed" in capsys.readouterr().err
    folder = unlearn("larger", **given, lr=5e-3)
    told = json.loads((folder / "verification.json").read_text())
    after, before = (stored(path)["model.norm.weight"] for path in (folder / "model", start))
    assert told["changed_parameters"] == int((after != before).sum()) > 0
