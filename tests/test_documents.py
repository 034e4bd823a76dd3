"""Documents of anybody's: what they say, or one `ValueError`, in bounded memory."""

import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fillm import documents
from fillm.documents import parse_json, parse_yaml, read_bytes, read_json_document, read_yaml_document

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
@settings(deadline=None)
def test_yaml_reads_what_was_written(value):
    assert parse_yaml(yaml.safe_dump(value)) == value


@given(st.text() | st.text("{}[]:,&*!?-|>'\"%@ #\n0aT.", max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_value_or_a_value_error(text):
    for parse in (parse_yaml, parse_json):
        try:
            parse(text)
        except ValueError as error:
            assert str(error)


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 8)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "more than 4194304 entries"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 100_000, "nested too deep"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: !!bool maybe", "maybe"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: " + "9" * 5000, "digits"),
        ("? {a: 1}\n: 1", "unhashable"),
        ("a: [", "expected"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("\x00", "special characters are not allowed"),
    ],
)
def test_yaml_that_cannot_be_taken(text, said):
    with pytest.raises(ValueError, match=said) as refused:
        parse_yaml(text)
    assert type(refused.value) is ValueError and "\n" not in str(refused.value)


def test_a_repeated_entry_is_no_bomb():
    shared = {"x": [1, 2]}
    assert parse_yaml(yaml.safe_dump([shared, shared])) == [shared, shared]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", ""])
def test_json_that_cannot_be_taken(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_file_is_read_up_to_its_bound(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(b"[1, 2]")
    assert read_bytes(path, 6) == b"[1, 2]" and read_json_document(path) == read_yaml_document(path) == [1, 2]
    with pytest.raises(ValueError, match="larger than 0 MiB"):
        read_bytes(path, 5)
    os.truncate(path, 10 << 30)  # sparse
    monkeypatch.setattr(documents.os, "fstat", lambda handle: os.stat(os.devnull))  # a size that is not told
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_bytes(path, 1 << 20)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")
