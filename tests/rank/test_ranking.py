import csv
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fillm.config import read_settings
from fillm.errors import NumericsError, RunFolderError, UsageError
from fillm.rank.ranking import Ranking
from fillm.runs.folder import RunFolder

COLUMNS = [
    "rank", "name", "kind", "layer", "numel", "score", "score_low", "score_high", "damping", "mean_retain_sq_norm",
    "forget_norm", "predicted_forget_gain", "retain_damage", "note",
]  # fmt: skip


def row(name, score, **fields):
    return {"name": name, "kind": "mlp", "layer": 0, "numel": 6, "score": score, **fields}


def ranked(rows, granularity="tensor", **options):
    return Ranking.from_rows(rows, granularity=granularity, method="soir", objective="forget", **options)


@pytest.fixture
def full():
    names = [f"model.layers.{layer}.mlp.{part}.weight" for layer in range(3) for part in ("up_proj", "down_proj")]
    draw = random.Random(0)
    rows = [
        row(name, draw.random(), score_low=0.0, damping=draw.random() * 1e-7, layer=i // 2, retain_damage=None)
        for i, name in enumerate(names)
    ]
    rows.append(row("model.embed_tokens.weight", 0.0, kind="embed", layer=-1, note="unused"))
    samples = pa.table({"id": ["a", "b"], "set": ["forget", "retain"], "tokens": [3, 4], "loss": [0.5, None]})
    return ranked(
        rows,
        updates={"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.float64)},
        samples=samples,
        settings={"model": "some/model", "damping": 0.1},
        record={"seconds": 1.5, "model_fingerprint": "f00"},
    )


def test_the_table_has_the_documented_columns_and_types(full):
    assert full.table.column_names == COLUMNS
    types = {field.name: str(field.type) for field in full.table.schema}
    assert [types[name] for name in ("rank", "layer", "numel", "score", "damping", "note")] == [
        "int64", "int64", "int64", "double", "double", "string",
    ]  # fmt: skip
    assert full.table["rank"].to_pylist() == list(range(1, 8))
    assert full.table["retain_damage"].null_count == 7


def test_largest_first_ties_by_name_unused_last():
    rows = [row("b", 1.0), row("z", 5.0, note="unused"), row("a", 1.0), row("c", math.inf), row("d", 0.0)]
    assert ranked(rows).names == ["c", "a", "b", "d", "z"]
    assert ranked(rows, ascending=True).names == ["d", "a", "b", "c", "z"]


def test_tiers_come_before_scores():
    rows = [row("a", 9.0, tier=1), row("b", 1.0, tier=0), row("c", 2.0)]
    assert ranked(rows).names == ["c", "b", "a"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.floats(allow_nan=False), st.booleans()),
        min_size=1,
        max_size=8,
        unique_by=lambda t: t[0],
    ),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_order_does_not_depend_on_the_order_of_the_rows(entries, ascending, draw):
    rows = [row(name, score, note="unused" if unused else "") for name, score, unused in entries]
    shuffled = draw.sample(rows, len(rows))
    one, other = ranked(rows, ascending=ascending), ranked(shuffled, ascending=ascending)
    assert one.table.equals(other.table)
    used = [r["score"] for r in one if r["note"] != "unused"]
    assert used == sorted(used, reverse=not ascending)
    assert [r["note"] for r in one] == sorted(r["note"] for r in one)


def test_rows_and_heads_have_an_index():
    rows = [row("w", 1.0, index=1), row("w", 1.0, index=0), row("v", 3.0, index=7)]
    ranking = ranked(rows, granularity="head")
    assert ranking.table.column_names == [*COLUMNS[:2], "index", *COLUMNS[2:]]
    assert list(ranking.scores.items()) == [(("v", 7), 3.0), (("w", 0), 1.0), (("w", 1), 1.0)]
    assert "v[7]" in repr(ranking)


def test_scores_names_length_and_repr(full):
    assert list(full.scores) == full.names and len(full) == 7
    assert full.scores["model.embed_tokens.weight"] == 0.0
    shown = repr(full).splitlines()
    assert (
        "method='soir'" in shown[0] and "7 entries" in shown[0] and full.names[0] in shown[1] and shown[-1] == "  ..."
    )


def test_nan_scores_and_odd_fields_are_refused():
    with pytest.raises(NumericsError, match="score of w is NaN"):
        ranked([row("w", math.nan)])
    with pytest.raises(UsageError, match="'colour'"):
        ranked([row("w", 1.0, colour="red")])
    with pytest.raises(UsageError, match="lacks the field 'index'"):
        ranked([row("w", 1.0)], granularity="row")
    with pytest.raises(UsageError, match="id, set, tokens, loss"):
        ranked([row("w", 1.0)], samples=pa.table({"id": ["a"]}))


def test_saved_and_loaded_is_the_same(full, tmp_path):
    assert full.save(tmp_path / "run") == tmp_path / "run"
    names = {"ranking.parquet", "ranking.csv", "update.safetensors", "samples.parquet", "run.yaml", "heatmap.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    loaded = Ranking.load(tmp_path / "run")
    assert loaded.table.equals(full.table) and loaded.samples.equals(full.samples)
    assert (loaded.method, loaded.objective, loaded.granularity) == ("soir", "forget", "tensor")
    assert loaded.settings == full.settings and loaded.record == full.record
    assert list(loaded.updates) == ["a", "b"] and len(loaded.updates) == 2
    for name in ("a", "b"):
        assert torch.equal(loaded.updates[name], full.updates[name])
    with pytest.raises(KeyError):
        loaded.updates["c"]
    assert read_settings(str(tmp_path / "run" / "run.yaml")) == full.settings


def test_a_loaded_ranking_saves_again_to_the_same_bytes(full, tmp_path):
    full.save(tmp_path / "one")
    Ranking.load(tmp_path / "one").save(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_csv_floats_read_back_to_the_bit(full, tmp_path):
    full.save(tmp_path / "run")
    with (tmp_path / "run" / "ranking.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    for name in ("score", "damping"):
        expected = full.table[name].to_pylist()
        assert [float(r[name]) if r[name] else None for r in rows] == expected
    assert rows[0]["retain_damage"] == ""


def test_infinite_scores_survive(tmp_path):
    ranked([row("w", math.inf, note="no retain gradient"), row("v", 1.0)]).save(tmp_path / "run")
    assert Ranking.load(tmp_path / "run").scores == {"w": math.inf, "v": 1.0}
    assert (tmp_path / "run" / "ranking.csv").read_text(encoding="utf-8").splitlines()[1].startswith("1,w,mlp,0,6,inf")


def test_without_updates_and_samples(tmp_path):
    ranked([row("w", 1.0)]).save(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "ranking.parquet",
        "ranking.csv",
        "run.yaml",
        "heatmap.png",
    }
    loaded = Ranking.load(tmp_path / "run")
    assert loaded.updates is None and loaded.samples is None


def test_an_existing_folder_needs_overwrite(full, tmp_path):
    full.save(tmp_path / "run")
    with pytest.raises(RunFolderError, match="exists; give --overwrite or another --out"):
        full.save(tmp_path / "run")
    ranked([row("w", 1.0)]).save(tmp_path / "run", overwrite=True)
    assert Ranking.load(tmp_path / "run").names == ["w"]


@pytest.mark.parametrize("name", ["ranking.parquet", "samples.parquet", "ranking.csv", "heatmap.png"])
def test_a_changed_byte_is_refused_by_name(full, tmp_path, name):
    full.save(tmp_path / "run")
    path = tmp_path / "run" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunFolderError, match=rf"{name}: damaged \(its checksum differs\)"):
        Ranking.load(tmp_path / "run")


def test_a_damaged_update_is_refused_when_asked_for(full, tmp_path):
    full.save(tmp_path / "run")
    path = tmp_path / "run" / "update.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    loaded = Ranking.load(tmp_path / "run")
    assert len(loaded) == 7
    with pytest.raises(RunFolderError, match=r"update.safetensors: damaged"):
        loaded.updates["a"]
    path.write_bytes(data[:-3])
    with pytest.raises(RunFolderError, match=r"update.safetensors: missing or damaged"):
        Ranking.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["ranking.parquet", "samples.parquet", "update.safetensors"])
def test_a_missing_file_is_refused_by_name(full, tmp_path, name):
    full.save(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(RunFolderError, match=rf"{name}: missing"):
        Ranking.load(tmp_path / "run")


def test_folders_that_are_no_finished_ranking_are_refused(full, tmp_path):
    with pytest.raises(RunFolderError, match="is a file; give the run folder that it lies in"):
        Ranking.load(__file__)
    with pytest.raises(RunFolderError, match="no such folder"):
        Ranking.load(tmp_path / "run")
    (tmp_path / "run.partial").mkdir()
    with pytest.raises(RunFolderError, match="not finished; continue it with --resume"):
        Ranking.load(tmp_path / "run")
    (tmp_path / "run.partial").rmdir()
    full.save(tmp_path / "run")
    record = tmp_path / "run" / "run.yaml"
    whole = record.read_text(encoding="utf-8")
    record.write_text("settings: [", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"run.yaml: damaged"):
        Ranking.load(tmp_path / "run")
    record.write_text("settings: {}\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not the record of a ranking"):
        Ranking.load(tmp_path / "run")
    found = yaml.safe_load(whole)
    del found["ranking"]["method"]
    record.write_text(yaml.safe_dump(found), encoding="utf-8")
    with pytest.raises(RunFolderError, match="says nothing of 'method'"):
        Ranking.load(tmp_path / "run")
    record.write_text(whole, encoding="utf-8")
    assert len(Ranking.load(tmp_path / "run")) == 7


def test_parquet_of_other_columns_is_refused(full, tmp_path):
    full.save(tmp_path / "run")
    path, record = tmp_path / "run" / "ranking.parquet", tmp_path / "run" / "run.yaml"
    found = yaml.safe_load(record.read_text(encoding="utf-8"))
    found["ranking"]["granularity"] = "row"
    record.write_text(yaml.safe_dump(found), encoding="utf-8")
    assert pq.read_schema(path).names == COLUMNS
    with pytest.raises(RunFolderError, match="its columns are not those of a ranking"):
        Ranking.load(tmp_path / "run")


def test_a_run_in_progress_finishes_with_a_ranking(full, tmp_path):
    with RunFolder(tmp_path / "run", overwrite=False, resume=False) as folder:
        folder.save_state("retain", 1, {"x": torch.ones(2)}, {})
        folder.finish(full.save)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list((tmp_path / "run").iterdir())) == 6
    assert Ranking.load(tmp_path / "run").table.equals(full.table)
