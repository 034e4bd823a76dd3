"""Mask files: what is written comes back; what is damaged or hostile is refused in one line that names the file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fillm.errors import MaskError, RunFolderError
from fillm.masks import Mask, TensorMask

SHAPES = {"a.bits": (5, 7), "b.rows": (11, 4), "c.whole": (3, 3), "d.vector": (17,), "e.stack": (2, 3, 5)}


def sample() -> Mask:
    generator = torch.Generator().manual_seed(3)
    chosen = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}
    chosen["b.rows"] = (torch.arange(11) % 3 == 0)[:, None].expand(11, 4)
    chosen["c.whole"] = torch.ones(3, 3, dtype=torch.bool)
    tensors = {name: TensorMask.from_bool(tensor) for name, tensor in chosen.items()}
    return Mask(tensors, {"method": "soir", "select": "top:0.1", "nested": [{"x": 1.5}]}, "f" * 64)


def read_all(path: Path) -> Mask:
    mask = Mask.load(path)
    return Mask(dict(mask), mask.provenance, mask.model_fingerprint)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    sample().save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


def refused(path: Path) -> str:
    """The one line with which reading a file is refused."""
    with pytest.raises(MaskError) as caught:
        read_all(path)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and len(line) < 700, line
    return line


def test_what_is_saved_comes_back_in_the_same_form_and_bytes(saved, tmp_path):
    mask, loaded = sample(), Mask.load(saved)
    assert loaded == mask and list(loaded) == sorted(SHAPES)
    assert [loaded[name].form for name in loaded] == ["bits", "rows", "whole", "bits", "bits"]
    assert (loaded.provenance, loaded.model_fingerprint) == (mask.provenance, mask.model_fingerprint)
    assert loaded["a.bits"] is loaded["a.bits"] and loaded.count == mask.count
    assert "a.bits" in loaded and "z" not in loaded
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "mask.safetensors"]


def test_any_safetensors_reader_opens_it_and_a_weight_takes_a_bit_at_most(saved):
    stored = load_file(saved)
    sizes = {name: tensor.numel() for name, tensor in stored.items()}
    assert sizes == {"a.bits": 5, "b.rows": 2, "d.vector": 3, "e.stack": 4}
    assert stored["b.rows"].tolist() == [0b01001001, 0b010]
    assert all(tensor.dtype == torch.uint8 for tensor in stored.values())


def test_bits_of_a_loaded_mask_are_mapped_and_writing_to_them_leaves_the_file(saved):
    before = saved.read_bytes()
    Mask.load(saved)["a.bits"].bits.fill_(0)
    assert saved.read_bytes() == before


def test_an_empty_mask_and_one_of_whole_tensors(tmp_path):
    for mask in (Mask({}), Mask({"a": TensorMask((3, 2)), "b": TensorMask(())})):
        mask.save(tmp_path / "m")
        assert Mask.load(tmp_path / "m") == mask and load_file(tmp_path / "m") == {}


def test_a_mask_is_saved_over_the_file_it_is_read_from(saved):
    mask = Mask.load(saved)
    (mask & Mask.load(saved)).save(saved)
    assert Mask.load(saved) == mask == sample()


def test_a_folder_that_takes_no_file_is_said_in_one_line(saved, tmp_path):
    with pytest.raises(RunFolderError, match="cannot write: No such file"):
        sample().save(tmp_path / "none" / "mask.safetensors")
    with pytest.raises(RunFolderError, match="cannot write"):
        sample().export_bool(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.safetensors"]


def test_bool_tensors_go_out_and_come_in(tmp_path):
    mask = sample()
    mask.export_bool(tmp_path / "bool.safetensors")
    plain = load_file(tmp_path / "bool.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in plain.items()} == SHAPES
    assert all(
        tensor.dtype == torch.bool and torch.equal(tensor, mask[name].to_bool()) for name, tensor in plain.items()
    )
    imported = Mask.import_bool(tmp_path / "bool.safetensors")
    assert imported == mask and imported["b.rows"].form == "rows" and imported.model_fingerprint is None
    save_file({"x": torch.ones(2, 3).bool(), "y": torch.zeros(4).bool()}, tmp_path / "other")
    assert Mask.import_bool(tmp_path / "other") == Mask({"x": TensorMask((2, 3))})


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"x": torch.ones(3)}, "x is of type F32; save a mask as bool tensors"),
        ({"x": torch.ones(3, dtype=torch.uint8)}, "x is of type U8"),
        ({"a/b": torch.ones(3).bool()}, "a tensor is called 'a/b': a parameter's name has no path separator"),
    ],
)
def test_bools_that_are_none_are_refused(tmp_path, tensors, complaint):
    save_file(tensors, tmp_path / "m")
    with pytest.raises(MaskError, match=complaint) as caught:
        Mask.import_bool(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


def test_true_is_whatever_is_not_zero(tmp_path):
    save_file({"x": torch.tensor([True, False, True])}, tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    data[-3:] = b"\x02\x00\xff"
    (tmp_path / "m").write_bytes(data)
    assert Mask.import_bool(tmp_path / "m")["x"].to_bool().tolist() == [True, False, True]


def test_files_that_are_no_masks(saved, tmp_path):
    assert "no such file" in refused(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refused(tmp_path / "folder")
    save_file({"x": torch.ones(3)}, tmp_path / "plain")
    assert "is no mask file (no fillm_mask in its metadata)" in refused(tmp_path / "plain")
    for data in (b"", b"x", b"\x80\x04}.", saved.read_bytes()[:-1], saved.read_bytes()[:40], saved.read_bytes() + b"x"):
        (tmp_path / "broken").write_bytes(data)
        assert "damaged, or no mask" in refused(tmp_path / "broken")
    for size in (1 << 62, (1 << 64) - 1, 200_000_000):
        (tmp_path / "broken").write_bytes(size.to_bytes(8, "little") + b"{}" * 50)
        assert "damaged, or no mask" in refused(tmp_path / "broken")
    (tmp_path / "broken").write_bytes((8).to_bytes(8, "little") + b'{"\xff\xfe":')
    assert "damaged, or no mask" in refused(tmp_path / "broken")


def test_a_flipped_bit_is_found_when_the_tensor_is_asked_for(saved):
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1  # of e.stack, the last
    saved.write_bytes(data)
    mask = Mask.load(saved)
    assert mask["a.bits"].count
    with pytest.raises(MaskError, match=r"mask.safetensors: damaged, or no mask \(the checksum of e.stack differs\)"):
        mask["e.stack"]


def rewritten(path: Path, change: Any, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """The file again, after `change(document)`, with checksums that fit: not damage but intent."""
    stored = load_file(path) if tensors is None else tensors
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    document = json.loads(header["__metadata__"]["fillm_mask"])
    for entry in document["record"]["tensors"]:
        if entry["name"] in stored:
            entry["sha256"] = hashlib.sha256(bytes(stored[entry["name"]].flatten().tolist())).hexdigest()
    change(document)
    document["sha256"] = hashlib.sha256(json.dumps(document["record"]).encode()).hexdigest()
    save_file(stored, path, {"fillm_mask": json.dumps(document)})
    return path


def entry_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in document["record"]["tensors"] if entry["name"] == name)


def test_rewriting_alone_is_not_refused(saved):
    assert read_all(rewritten(saved, lambda document: None)) == sample()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(format_version=2), "of format version 2, this fillm reads 1"),
        (lambda d: d.update(record=[1]), "damaged"),
        (lambda d: d["record"].pop("tensors"), "'tensors'"),
        (lambda d: d["record"].update(tensors=3), "damaged"),
        (lambda d: d["record"].update(provenance=[]), "provenance or fingerprint of another type"),
        (lambda d: d["record"].update(model_fingerprint=7), "provenance or fingerprint of another type"),
        (lambda d: entry_of(d, "c.whole").update(name="../../etc/passwd"), "a parameter's name has no path separator"),
        (lambda d: entry_of(d, "c.whole").update(name="c\nd"), "no control character"),
        (lambda d: entry_of(d, "c.whole").update(name=None), "a name is a string"),
        (lambda d: entry_of(d, "c.whole").update(name="z"), "not in the order of their names"),
        (lambda d: d["record"]["tensors"].append(entry_of(d, "e.stack")), "not in the order of their names"),
        (lambda d: entry_of(d, "c.whole").update(form="bits"), "its tensors are not those of its record"),
        (lambda d: entry_of(d, "a.bits").update(form="whole"), "its tensors are not those of its record"),
        (lambda d: entry_of(d, "a.bits").update(form="pickle"), "unknown form"),
        (lambda d: entry_of(d, "a.bits").update(sha256=None), "unknown form or no checksum"),
        (lambda d: entry_of(d, "a.bits").update(shape=[5, 9]), r"must be U8 [6], not U8 [5]"),
        (lambda d: entry_of(d, "a.bits").update(shape=[5, -7]), "its shape is no list of sizes"),
        (lambda d: entry_of(d, "a.bits").update(shape=[5, True]), "its shape is no list of sizes"),
        (lambda d: entry_of(d, "a.bits").update(shape="57"), "its shape is no list of sizes"),
        (lambda d: entry_of(d, "c.whole").update(shape=[1 << 40, 1 << 40]), "no tensor has the shape"),
        (lambda d: entry_of(d, "b.rows").update(shape=[]), "no tensor has the shape []"),
        (lambda d: entry_of(d, "b.rows").pop("shape"), "'shape'"),
    ],
)
def test_hostile_records_are_refused(saved, change, complaint):
    assert complaint in refused(rewritten(saved, change))


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("a.bits", torch.tensor([1, 0, 0, 0, 8], dtype=torch.uint8), "a.bits: its bits past weight 35 are not 0"),
        ("b.rows", torch.tensor([1, 8], dtype=torch.uint8), "b.rows: its bits past weight 11 are not 0"),
        ("a.bits", torch.zeros(5, dtype=torch.uint8), "a.bits: nothing of it is selected"),
        ("b.rows", torch.zeros(2, dtype=torch.uint8), "b.rows: nothing of it is selected"),
        ("a.bits", torch.zeros(5, dtype=torch.int8), "a.bits: its bytes must be U8 [5], not I8 [5]"),
        ("a.bits", torch.ones(5, 1, dtype=torch.uint8), "a.bits: its bytes must be U8 [5], not U8 [5, 1]"),
        ("extra", torch.ones(5, dtype=torch.uint8), "its tensors are not those of its record"),
    ],
)
def test_hostile_tensors_are_refused(saved, name, tensor, complaint):
    stored = load_file(saved) | {name: tensor}
    assert complaint in refused(rewritten(saved, lambda document: None, stored))


def test_records_that_are_no_json(saved):
    for text in (
        "",
        "{",
        "[" * 100_000,
        "9" * 5000,
        "null",
        '{"format_version": 1}',
        '{"format_version": 1, "record": {}}',
    ):
        save_file({}, saved, {"fillm_mask": text})
        refused(saved)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happens_to_the_bytes_the_mask_is_the_same_or_refused_in_one_line(saved, tmp_path, data):
    sample().save(saved)
    whole = saved.read_bytes()
    places = st.integers(0, len(whole) - 1)
    damage = data.draw(st.sampled_from(["flip", "byte", "cut", "insert", "zero", "swap"]))
    changed = bytearray(whole)
    at = data.draw(places)
    if damage == "flip":
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "byte":
        changed[at] = data.draw(st.integers(0, 255))
    elif damage == "cut":
        del changed[at:]
    elif damage == "insert":
        changed[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    elif damage == "zero":
        changed[at : at + data.draw(st.integers(1, 64))] = b""
    else:
        other = data.draw(places)
        changed[at], changed[other] = changed[other], changed[at]
    path = tmp_path / "damaged"
    path.write_bytes(changed)
    try:
        mask = read_all(path)
    except MaskError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        expected = sample()
        assert mask == expected and mask.model_fingerprint == expected.model_fingerprint
