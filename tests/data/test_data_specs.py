"""Every form of a data spec, slices as Python's, and what is said of a spec that is none."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fillm.data import load_rows
from fillm.data.specs import DataSpec, parse_spec
from fillm.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fictional:forget05", DataSpec("fictional", "forget05", "fictional:forget05")),
        ("fictional-small:full", DataSpec("fictional-small", "full", "fictional-small:full")),
        ("tofu:full[3600:3960]", DataSpec("tofu", "full", "tofu:full", (3600, 3960))),
        ("tofu:full[3600:]", DataSpec("tofu", "full", "tofu:full", (3600, None))),
        (
            "knowundo:privacy/unlearn_train",
            DataSpec("knowundo", "privacy/unlearn_train", "knowundo:privacy/unlearn_train"),
        ),
        ("rows.jsonl[:100]", DataSpec("file", "rows.jsonl", "rows.jsonl", (None, 100))),
        ("a folder/b[1].json[-3:-1]", DataSpec("file", "a folder/b[1].json", "a folder/b[1].json", (-3, -1))),
        ("TABLE.CSV", DataSpec("file", "TABLE.CSV", "TABLE.CSV")),
        ("x.parquet[ 2 : 3 ]", DataSpec("file", "x.parquet", "x.parquet", (2, 3))),
        ("hub:o/n", DataSpec("hub", "o/n", "hub:o/n")),
        ("hub:o/n:c", DataSpec("hub", "o/n", "hub:o/n:c", None, "c")),
        ("hub:o/n:c:s[:4]", DataSpec("hub", "o/n", "hub:o/n:c:s", (None, 4), "c", "s")),
        ("hub:o/n::s", DataSpec("hub", "o/n", "hub:o/n::s", None, None, "s")),
    ],
)
def test_every_form_is_parsed(text: str, expected: DataSpec) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not a data spec"),
        ("rows.txt", "not a data spec; give a path that ends in .json, .jsonl, .csv, .parquet"),
        ("tofo:full", "tofo:full: not a data spec"),
        ("tofu:", "name a split after 'tofu:', such as tofu:forget01"),
        ("tofu", "such as tofu:forget01"),
        ("tofu:../secret", "name a split after 'tofu:'"),
        ("hub:name-without-owner", "hub:owner/name"),
        ("hub:o/n:c:s:x", "hub:owner/name"),
        ("rows.json[5]", "[5] is not a slice"),
        ("rows.json[1:2:3]", "[1:2:3] is not a slice"),
        ("rows.json[a:b]", "[a:b] is not a slice"),
        ("rows.json[]", "[] is not a slice"),
    ],
)
def test_what_is_no_spec_is_named(text: str, part: str) -> None:
    with pytest.raises(DataError) as error:
        parse_spec(text)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


bounds = st.none() | st.integers(-12, 12)


@given(start=bounds, stop=bounds, count=st.integers(1, 10))
def test_slices_are_pythons(start: int | None, stop: int | None, count: int) -> None:
    text = f"rows.json[{'' if start is None else start}:{'' if stop is None else stop}]"
    expected = list(range(count))[start:stop]
    if expected:
        assert list(parse_spec(text).cut(count)) == expected
    else:
        with pytest.raises(DataError, match=r"the slice is empty; rows.json has"):
            parse_spec(text).cut(count)


def test_rows_keep_their_number_and_name_through_a_slice(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n\n" for i in range(5)), encoding="utf-8")
    rows = load_rows(f"{file}[-2:]")
    assert [row.fields["text"] for row in rows] == ["row 3", "row 4"]
    assert [row.number for row in rows] == [3, 4]
    assert [row.line for row in rows] == [7, 9]  # every second line is blank
    assert rows[0].id == f"{file}#3"
    assert rows[0].where == f"{file}, line 7"
    fictional = load_rows("fictional-small:full[760:762]")
    assert [row.id for row in fictional] == ["fictional-small:full#760", "fictional-small:full#761"]
    assert fictional[0].where == "fictional-small:full, row 761"
    assert [row.fields for row in fictional] == [row.fields for row in load_rows("fictional-small:forget05[:2]")]
