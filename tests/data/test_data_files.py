"""Every file format read back, and every way in which a file can be wrong, named with file and line."""

import csv
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fillm.data import load_rows
from fillm.errors import DataError, UsageError

ROWS = [
    {"question": "Où est-ce?", "answer": 'He said "yes",\nand left.'},
    {"question": "{braces} [brackets]", "answer": "9007199254740993 🙂"},
    {"question": "third", "answer": "it is the third"},
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.stem == "array":
        path.write_text("\n " + json.dumps(rows, indent=2), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["array.json", "lines.json", "lines.jsonl", "table.csv", "table.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    rows = load_rows(str(path))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [0, 1, 2]
    assert load_rows(path) == rows  # a Path will do as well


def test_lines_of_a_csv_are_counted_through_quoted_line_breaks(tmp_path: Path) -> None:
    rows = load_rows(str(write(tmp_path / "table.csv", ROWS)))
    assert [row.line for row in rows] == [2, 4, 5]


@pytest.mark.parametrize("name", ["array.json", "lines.json", "lines.jsonl", "table.csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_field(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.fields for row in load_rows(str(path))] == ROWS


def test_integers_of_64_bits_survive(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [1, 9007199254740993], "labels": [-100, 9007199254740993]}\n', encoding="utf-8")
    assert load_rows(str(path))[0].fields["input_ids"] == [1, 2**53 + 1]


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "lines.jsonl", ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_rows("~/lines.jsonl")) == 3


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "the file holds no rows"),
        ("a.json", b"[]", "the file holds no rows"),
        ("a.csv", b"question,answer\n", "the file holds no rows"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: bad JSON (Expecting value"),
        ("a.json", b'{"text": "x"}\n\n{bad}\n', "a.json, line 3: bad JSON"),
        ("a.json", b'[\n{"text": "x"},\n{"text" "y"}]', "a.json, line 3: bad JSON"),
        ("a.json", b"[" * 200_000, "a.json, line 1: bad JSON"),
        ("a.json", b'{\n"rows": []}', "line 1: bad JSON"),
        ("a.json", b"[1, 2]", "a.json, row 1: expected an object with fields such as question and answer, found int"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl, line 2: expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8 (byte 0xff)"),
        ("a.json", b'[\n\n{"text": "\xe9"}]', "a.json, line 3: not UTF-8"),
        ("a.csv", b"text\nx\n\xfe\n", "a.csv, line 3: not UTF-8"),
        ("a.csv", b"question,answer\na,b,c\n", "a.csv, line 2: has 3 columns where the header has 2"),
        ("a.csv", b'question,answer\na,"b\n', "a.csv, line 2: bad CSV"),
        ("a.parquet", b"PAR1 this is none", "a.parquet: "),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_rows(str(path))
    assert part in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file; check the path"):
        load_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        load_rows(str(tmp_path / "folder.json"))
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(str(tmp_path / "loop.csv"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "lines.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        load_rows(str(path))


def test_rows_in_memory() -> None:
    rows = load_rows(ROWS)
    assert [row.fields for row in rows] == ROWS
    assert rows[2].id == "rows#2"
    assert rows[2].where == "rows, row 3"
    assert load_rows(rows[1:]) == rows[1:]  # rows keep where they came from
    assert [row.fields for row in load_rows(iter(ROWS))] == ROWS
    with pytest.raises(DataError, match="rows, row 2: expected an object"):
        load_rows([ROWS[0], "text"])
    with pytest.raises(DataError, match="holds no rows"):
        load_rows([])
    with pytest.raises(UsageError, match="several splits was given \\(train, test\\)"):
        load_rows({"train": ROWS, "test": ROWS})
    with pytest.raises(UsageError, match="cannot be read from int"):
        load_rows(3)
