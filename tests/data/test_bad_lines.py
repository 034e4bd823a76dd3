"""Lines that cannot be read, under `skip_bad_rows`: counted and listed with file and line, like any other bad row."""

import pytest

from fillm.data import load_rows, tokenize_rows
from fillm.errors import DataError
from tests.data.byte_tokenizer import build_tokenizer

GOOD = b'{"question": "Who?", "answer": "Ada."}'


@pytest.fixture
def mixed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, b'{"question": ', GOOD, b"[1, 2]", b'{"question": "\xff"}', GOOD]))
    return str(path)


def test_the_first_bad_line_is_named_without_it(mixed):
    with pytest.raises(DataError, match="rows.jsonl, line 2: bad JSON"):
        load_rows(mixed)


@pytest.mark.parametrize("line", [b'{"question": ', b"[1, 2]", b'{"question": "\xff"}'])
def test_the_way_to_leave_a_bad_line_out_is_named_and_works(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line)
    with pytest.raises(DataError, match=r"line 2: .*; mend the row, or leave such rows out with --skip-bad-rows$"):
        load_rows(str(path))
    assert len(tokenize_rows(load_rows(str(path), skip_bad_rows=True), build_tokenizer(), skip_bad_rows=True)) == 1


def test_a_file_that_is_no_array_cannot_be_skipped_into_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + GOOD)
    with pytest.raises(DataError, match="bad JSON") as caught:
        load_rows(str(path))
    assert "--skip-bad-rows" not in str(caught.value)


def test_bad_lines_are_counted_and_listed_with_it(mixed):
    rows = load_rows(mixed, skip_bad_rows=True)
    samples = tokenize_rows(rows, build_tokenizer(), skip_bad_rows=True)
    assert [sample.id.partition("#")[2] for sample in samples] == ["0", "2", "5"]
    assert [where.rpartition(", ")[2] for where, _ in samples.skipped] == ["line 2", "line 4", "line 5"]
    reasons = [why for _, why in samples.skipped]
    assert "bad JSON" in reasons[0] and "found list" in reasons[1] and "not UTF-8" in reasons[2]
