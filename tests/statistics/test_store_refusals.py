"""What a sketch store refuses, in one line that says why: damage, strangers, two writers, a disk that is full."""

import dataclasses
import errno
import json
import os
import re
import shutil

import pytest
import torch

from fillm.data import Sample, SampleSet
from fillm.errors import FillmError, StoreError
from fillm.runs import state_files
from fillm.statistics import SketchStore, StoredSketches, store_format, store_writer
from tests.statistics.store_feed import MAPS, MODEL, SETTINGS, all_bytes, build, feed, plan, samples

COUNT = 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(store_writer, "BLOCK_SAMPLES", 4)


@pytest.fixture
def path(tmp_path):
    """A store of two blocks, of four rows and of three."""
    build(tmp_path / "store", COUNT)
    return tmp_path / "store"


@pytest.fixture
def unfinished(tmp_path):
    """One that was stopped after its first block."""
    with StoredSketches(tmp_path / "store", MAPS, samples(COUNT), MODEL, SETTINGS) as store:
        feed(store, most=2)
    return tmp_path / "store"


def read_all(path):
    store = SketchStore.open(path)
    return store.q, [store.sketches(name) for name in MAPS]


def write(path, count=COUNT, maps=MAPS, model=MODEL, settings=SETTINGS, given=None):
    with StoredSketches(path, maps, samples(count) if given is None else given, model, settings) as store:
        feed(store)


def refusal(action, *arguments, **options):
    """The one line that an action is refused with."""
    with pytest.raises(StoreError) as refused:
        action(*arguments, **options)
    line = str(refused.value)
    assert "\n" not in line and refused.value.exit_code == 2
    return line


def test_a_store_error_is_a_mistake_that_can_be_mended():
    assert issubclass(StoreError, FillmError)


FILES = [f"sketches/{index}.bin" for index in range(len(MAPS))] + [
    "squared_norms.bin",
    "blocks/0.json",
    "blocks/1.json",
]


def of_rows(file):
    """What a file of rows holds, as messages call it."""
    return "the squared norms" if file.startswith("sq") else list(MAPS)[int(file[9])]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(path, file):
    whole = (path / file).read_bytes()
    for at in {
        0,
        len(whole) // 2 - 1,
        len(whole) // 2,
        len(whole) * 4 // 7 - 1,
        len(whole) * 4 // 7 + 1,
        len(whole) - 1,
    }:
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << at % 8
        (path / file).write_bytes(spoilt)
        line = refusal(read_all, path)
        assert str(path / file) in line and "damaged" in line and "another --store" in line
        if file.endswith(".bin"):
            assert f"block {0 if at < len(whole) * 4 // 7 else 1} of " in line and of_rows(file) in line
    (path / file).write_bytes(whole)
    read_all(path)


def test_a_flipped_bit_of_the_manifest_is_found_or_says_the_same(path):
    whole = (path / "manifest.json").read_bytes()
    manifest, refused = SketchStore.open(path).manifest, 0
    for at in range(0, len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << at % 7
        (path / "manifest.json").write_bytes(spoilt)
        try:
            assert SketchStore.open(path).manifest == manifest  # white space between entries
        except StoreError as error:
            assert str(path / "manifest.json") in str(error)
            refused += 1
    assert refused > len(whole) / 14


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_cut_short_is_found_by_readers_and_writers(path, file):
    os.truncate(path / file, (path / file).stat().st_size - 1)
    for line in (refusal(SketchStore.open, path), refusal(write, path, COUNT + 2)):
        assert str(path / file) in line and "damaged" in line
        assert file.endswith(".json") or of_rows(file) in line


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_gone_is_found_by_readers_and_writers(path, file):
    (path / file).unlink()
    for line in (refusal(SketchStore.open, path), refusal(write, path, COUNT + 2)):
        assert f"{path / file}: missing" in line


def test_blocks_that_changed_places_are_found(path):
    (path / "blocks/0.json").rename(path / "0")
    (path / "blocks/1.json").rename(path / "blocks/0.json")
    (path / "0").rename(path / "blocks/1.json")
    assert "blocks/0.json: damaged" in refusal(SketchStore.open, path)


def test_a_file_that_shrinks_after_the_store_was_opened_is_found(path):
    store = SketchStore.open(path)
    os.truncate(path / "sketches/0.bin", 100)
    assert "sketches/0.bin: damaged (weight: 100 bytes, not 448)" in refusal(store.sketches, "weight")


def test_a_store_without_manifest_is_none(path, tmp_path):
    (path / "manifest.json").unlink()
    before = all_bytes(path)
    assert "is not a sketch store (no manifest.json)" in refusal(SketchStore.open, path)
    assert "is not a sketch store (no manifest.json)" in refusal(write, path)
    assert all_bytes(path) == before
    assert "is not a sketch store (no manifest.json)" in refusal(SketchStore.open, tmp_path / "nothing")


def test_a_folder_or_file_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert "is not a sketch store" in refusal(write, tmp_path / "store")
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == ["thesis.tex"]
    assert "is not a folder" in refusal(write, tmp_path / "store" / "thesis.tex")


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "store").mkdir()
    build(tmp_path / "store", 3)
    assert SketchStore.open(tmp_path / "store").rows == 3


def rewrite_manifest(path, **changes):
    record = state_files.read_json(path / "manifest.json")
    state_files.write_json(path / "manifest.json", {**record, **changes})


def test_a_newer_version_is_refused(path):
    rewrite_manifest(path, format_version=2, something="else")
    for line in (refusal(SketchStore.open, path), refusal(write, path)):
        assert "manifest.json: of format version 2, this fillm reads 1; use a newer fillm" in line


def test_a_manifest_that_lacks_an_entry_is_refused(path):
    rewrite_manifest(path, settings={"kind": "oporp"})
    assert "manifest.json: damaged" in refusal(SketchStore.open, path)


def both(path, **changes):
    """What a reader and a writer refuse with; they agree."""
    asked = {"model": MODEL, "settings": SETTINGS, "samples": samples(COUNT), "maps": MAPS} | changes
    before = all_bytes(path)
    line = refusal(SketchStore.open(path).check, **asked)
    assert line == refusal(write, path, given=asked.pop("samples"), **asked) and str(path) in line
    assert all_bytes(path) == before
    return line


@pytest.mark.parametrize("state", ["path", "unfinished"])
def test_another_model_is_refused(request, state):
    line = both(request.getfixturevalue(state), model="0a" * 32)
    assert f"made from another model (model was {MODEL}, is {'0a' * 32})" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", "sjlt"), ("sketch_dim", 32), ("seed", 4), ("dtype", "bfloat16"), ("loss_reduction", "sum")],
)
@pytest.mark.parametrize("state", ["path", "unfinished"])
def test_another_setting_is_refused(request, state, name, value):
    line = both(request.getfixturevalue(state), settings=dataclasses.replace(SETTINGS, **{name: value}))
    assert f"other settings ({name} was {getattr(SETTINGS, name)}, is {value})" in line


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "sjlt"), ("seed", 5), ("shape", (7, 9)), ("halves", 2), ("dim", 8)]
)
def test_another_map_is_refused(path, field, value):
    line = both(path, maps={**MAPS, "weight": dataclasses.replace(MAPS["weight"], **{field: value})})
    assert f"weight was sketched otherwise ({field} was {getattr(MAPS['weight'], field)}, is {value})" in line


def test_a_tensor_that_is_not_there_is_named(path):
    assert "holds no sketches of more" in both(path, maps={**MAPS, "more": MAPS["weight"]})


def test_some_of_the_tensors_can_be_read_but_not_written(path):
    some = {"norm": MAPS["norm"]}
    assert list(SketchStore.open(path).check(MODEL, SETTINGS, samples(COUNT), some)) == []
    assert "holds sketches of weight, which is out of scope" in refusal(write, path, maps=some)


def other_tokens(at, count=COUNT):
    given = list(samples(count))
    given[at] = Sample(given[at].id, (*given[at].input_ids[:-1], 999), given[at].labels)
    return SampleSet(given, "other.jsonl")


@pytest.mark.parametrize("at", [0, 3, 6])
def test_another_data_set_is_refused_and_the_sample_named(path, at):
    assert f"another data set (sample {at} was feed#{at} and is feed#{at}, of other tokens)" in both(
        path, samples=other_tokens(at)
    )


def test_other_labels_are_another_data_set(path):
    given = list(samples(COUNT))
    given[3] = Sample("feed#3", given[3].input_ids, (-100, *given[3].labels[1:-1], -100))
    assert "another data set (sample 3" in both(path, samples=SampleSet(given, "x"))


def test_samples_in_another_order_are_another_data_set(path):
    assert "another data set" in both(path, samples=samples(COUNT).subset([1, 0, 2, 3, 4, 5, 6]))


def test_other_names_for_the_same_tokens_are_the_same_data_set(path):
    given = SampleSet([Sample("renamed", s.input_ids, s.labels) for s in samples(COUNT)], "moved.jsonl")
    assert list(SketchStore.open(path).check(MODEL, SETTINGS, given, MAPS)) == []


def test_fewer_samples_than_are_stored_are_refused(path):
    assert "is of 7 samples, feed has 6" in both(path, samples=samples(6))


def test_more_samples_are_to_be_added(path):
    assert SketchStore.open(path).check(MODEL, SETTINGS, samples(10), MAPS) == range(7, 10)


def test_an_unfinished_store_goes_on_with_its_own_samples_only(unfinished):
    # The samples stored are the last four: nothing but the joint fingerprint knows the others.
    assert SketchStore.open(unfinished).positions.tolist() == [6, 5, 4, 3]
    assert "is unfinished, of 7 samples, and those of other.jsonl are others" in both(
        unfinished, samples=other_tokens(0)
    )
    assert "is unfinished, of 7 samples, and those of feed are 9" in both(unfinished, samples=samples(9))
    assert "is of 7 samples, feed has 5" in both(unfinished, samples=samples(5))


def test_an_unfinished_store_goes_on_with_its_own_batches_only(unfinished):
    before = all_bytes(unfinished)
    with StoredSketches(unfinished, MAPS, samples(COUNT), MODEL, SETTINGS) as store:
        line = refusal(store.resume_point, plan(range(COUNT), size=3))
    assert "in other batches; give the --tokens-per-batch that it was begun with" in line
    assert all_bytes(unfinished) == before


def test_two_writers_are_refused_and_the_first_goes_on(path):
    with StoredSketches(path, MAPS, samples(10), MODEL, SETTINGS) as store:
        assert "another run writes to it; wait for it" in refusal(write, path, 10)
        feed(store)
    assert SketchStore.open(path).rows == 10
    write(path, 12)


def test_a_writer_that_was_refused_leaves_the_store_to_others(path):
    refusal(write, path, model="0a" * 32)
    write(path, 9)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_stored(path, monkeypatch, tmp_path, call):
    """At every call of an append; what is given again afterwards ends with the same bytes."""
    shutil.copytree(path, tmp_path / "whole")
    write(tmp_path / "whole", 12)
    real, counted = getattr(os, call), [0]

    def counting(*given):
        counted[0] -= 1
        if counted[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)

    refused = 0
    with monkeypatch.context() as patch:
        patch.setattr(os, call, counting)
        for at in range(1, 60):
            counted[0] = at
            try:
                write(path, 12)
            except StoreError as error:
                assert re.search("cannot write: No space left on device; what was stored before is good", str(error))
                refused += 1
                assert SketchStore.open(path).rows in (7, 11)
            else:
                break
    assert refused > 1
    write(path, 12)
    assert all_bytes(path) == all_bytes(tmp_path / "whole")
    read_all(path)


def test_what_lies_beyond_the_manifest_is_cut_off(unfinished, tmp_path):
    write(tmp_path / "whole")
    for file in [*(unfinished / "sketches").iterdir(), unfinished / "squared_norms.bin"]:
        with file.open("ab") as end:
            end.write(b"rows of a block that was longer" * 100)
    for name in ("blocks/1.json", "blocks/1.json.tmp", "blocks/2.json", "manifest.json.tmp"):
        (unfinished / name).write_text('{"rec', encoding="utf-8")
    assert SketchStore.open(unfinished).rows == 4
    read_all(unfinished)
    write(unfinished)
    assert all_bytes(unfinished) == all_bytes(tmp_path / "whole")


def test_files_are_named_as_the_page_says(path):
    names = sorted(all_bytes(path))
    assert names == sorted([*FILES, "manifest.json", "lock"])
    record = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["record"]
    assert record["format_version"] == store_format.FORMAT_VERSION and record["rows"] == COUNT
    assert torch.tensor([block["rows"] for block in record["blocks"]]).sum() == COUNT
