"""TOFU and KnowUnDo from a data root, and from a Hub that the tests stand in for."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fillm.data import load_rows
from fillm.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The Hub cannot be reached; returns the calls that were made to it."""
    calls: list[tuple[Any, ...]] = []

    def refuse(name: str, config: str | None = None, *, split: str | None = None) -> Any:
        calls.append((name, config, split))
        raise ConnectionError("no route to the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.delenv("FILLM_DATA", raising=False)
    return calls


def serve(monkeypatch: pytest.MonkeyPatch, answers: dict[tuple[Any, ...], Any]) -> None:
    def load(name: str, config: str | None = None, *, split: str | None = None) -> Any:
        return answers[name, config, split]

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tofu").mkdir()
    rows = [{"question": f"q{i}", "answer": f"a{i}", "perturbed_answer": ["x", "y"]} for i in range(4)]
    (tmp_path / "tofu" / "full.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tofu" / "mine.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    (tmp_path / "knowundo" / "privacy").mkdir(parents=True)
    (tmp_path / "knowundo" / "privacy" / "unlearn_train.json").write_text(
        json.dumps([{"text": "who?", "labels": "she"}], indent=4), encoding="utf-8"
    )
    return tmp_path


def test_a_data_root_comes_before_the_hub(root: Path, no_network: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_rows("tofu:full[1:3]", data_root=str(root))
    assert [row.fields["answer"] for row in rows] == ["a1", "a2"]
    assert rows[0].fields["perturbed_answer"] == ["x", "y"]
    assert rows[0].id == "tofu:full#1"
    assert load_rows("knowundo:privacy/unlearn_train", data_root=str(root))[0].fields == {
        "text": "who?",
        "labels": "she",
    }
    assert len(load_rows("tofu:mine", data_root=str(root))) == 1
    monkeypatch.setenv("FILLM_DATA", str(root))
    assert load_rows("tofu:full[1:3]") == rows
    assert no_network == []


def test_without_a_data_root_and_without_a_network(root: Path, no_network: list[Any]) -> None:
    for data_root in (None, str(root)):  # this root does not hold forget01
        with pytest.raises(DataError) as error:
            load_rows("tofu:forget01", data_root=data_root)
        assert str(error.value).startswith(
            "tofu:forget01: locuslab/TOFU could not be had from the Hub (ConnectionError"
        )
        assert "give --data-root (or FILLM_DATA) a folder that holds tofu/forget01.json" in str(error.value)
        assert "\n" not in str(error.value)
    assert no_network == [("locuslab/TOFU", "forget01", "train")] * 2


def test_an_unknown_split_lists_the_known_ones(root: Path, no_network: list[Any]) -> None:
    with pytest.raises(DataError, match=r"tofu:forget07: no such split; there are forget01, .*mine, .*retain90"):
        load_rows("tofu:forget07", data_root=str(root))
    with pytest.raises(DataError, match=r"there are copyright/retention_train, .*privacy/unlearn_val"):
        load_rows("knowundo:privacy/unlearn")
    assert no_network == []


def test_a_data_root_that_is_no_folder() -> None:
    with pytest.raises(UsageError, match=r"--data-root /no/such: no such folder; it should hold tofu/full.json"):
        load_rows("tofu:full", data_root="/no/such")


def test_tofu_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list([{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}])
    serve(monkeypatch, {("locuslab/TOFU", "retain99", "train"): table})
    assert [row.fields["answer"] for row in load_rows("tofu:retain99[1:]")] == ["b"]


@pytest.mark.parametrize("columnar", [False, True])
def test_knowundo_from_the_hub_is_nested(monkeypatch: pytest.MonkeyPatch, columnar: bool) -> None:
    cell: Any = [{"text": "a?", "labels": "b"}, {"text": "c?", "labels": "d"}]
    if columnar:
        cell = {"text": ["a?", "c?"], "labels": ["b", "d"]}
    serve(monkeypatch, {("zjunlp/KnowUnDo", "privacy", "unlearn"): [{"train": cell, "val": []}]})
    rows = load_rows("knowundo:privacy/unlearn_train")
    assert [row.fields for row in rows] == [{"text": "a?", "labels": "b"}, {"text": "c?", "labels": "d"}]
    with pytest.raises(DataError, match="knowundo:privacy/unlearn_val: holds no rows"):
        load_rows("knowundo:privacy/unlearn_val")


def test_any_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    one = datasets.Dataset.from_list([{"text": "x"}])
    serve(
        monkeypatch,
        {
            ("o/n", None, None): datasets.DatasetDict(train=one),
            ("o/n", "c", None): datasets.DatasetDict(train=one, test=one),
            ("o/n", "c", "test"): one,
        },
    )
    assert load_rows("hub:o/n")[0].fields == {"text": "x"}
    assert load_rows("hub:o/n:c:test")[0].id == "hub:o/n:c:test#0"
    with pytest.raises(DataError, match="o/n has the splits train, test; name one: hub:o/n:c:SPLIT"):
        load_rows("hub:o/n:c")


def test_a_dataset_in_memory() -> None:
    table = datasets.Dataset.from_list([{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}])
    assert [row.fields["question"] for row in load_rows(table)] == ["q", "r"]
    with pytest.raises(UsageError, match="several splits was given"):
        load_rows(datasets.DatasetDict(train=table))
