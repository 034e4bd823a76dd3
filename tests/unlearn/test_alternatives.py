"""Refusals: where they come from, and that a sample's own does not depend on the others."""

import pytest

from fillm.data import load_rows, take, tokenize_rows
from fillm.errors import DataError
from fillm.unlearn.alternatives import REFUSALS, read_refusals, with_refusals
from tests.data.byte_tokenizer import build_tokenizer

ROWS = [{"question": f"Where was writer {n} born?", "answer": f"In town {n}.", "city": n} for n in range(25)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_built_in_refusals_are_distinct_sentences():
    assert len(set(REFUSALS)) == len(REFUSALS) >= 20
    assert all(line == line.strip() and line.endswith(".") for line in REFUSALS)
    assert read_refusals(None) is REFUSALS


def test_a_file_of_refusals(tmp_path):
    path = tmp_path / "idk.txt"
    path.write_text("No idea.\n\n  Unbekannt, weiß nicht.  \n", encoding="utf-8")
    assert read_refusals(path) == ("No idea.", "Unbekannt, weiß nicht.")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "No such file"), (b"\n  \n", "holds no line"), (b"", "holds no line"), (b"ok\n\xff\xfe", "not UTF-8")],
)
def test_a_file_that_cannot_be_used(tmp_path, content, complaint):
    path = tmp_path / "idk.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"--idk .*idk.txt: .*{complaint}"):
        read_refusals(path)


def test_questions_stay_and_answers_go(tokenizer):
    rows = load_rows(ROWS)
    samples = tokenize_rows(rows, tokenizer)
    before = [dict(row.fields) for row in rows]
    changed = with_refusals(rows, samples, REFUSALS, seed=0)
    assert [row.fields for row in rows] == before
    assert [row.id for row in changed] == [sample.id for sample in samples]
    for row, old in zip(changed, rows, strict=True):
        assert row.fields["answer"] in REFUSALS and row.where == old.where
        assert {**row.fields, "answer": old.fields["answer"]} == old.fields
    assert len({row.fields["answer"] for row in changed}) > 5
    alternatives = tokenize_rows(changed, tokenizer)
    for sample, other in zip(samples, alternatives, strict=True):
        prompt = sample.num_tokens - sample.num_counted
        assert other.input_ids[:prompt] == sample.input_ids[:prompt]
        assert other.num_tokens - other.num_counted == prompt


def test_the_draw_is_the_samples_own(tokenizer):
    rows = load_rows(ROWS)
    samples = tokenize_rows(rows, tokenizer)
    drawn = {row.id: row.fields["answer"] for row in with_refusals(rows, samples, REFUSALS, seed=4)}
    some = take(samples, 7, seed=1)
    assert [(row.id, row.fields["answer"]) for row in with_refusals(rows, some, REFUSALS, seed=4)] == [
        (sample.id, drawn[sample.id]) for sample in some
    ]
    other = {row.id: row.fields["answer"] for row in with_refusals(rows, samples, REFUSALS, seed=5)}
    assert other != drawn


def test_text_with_labels(tokenizer):
    rows = load_rows([{"text": "Who wrote it?", "labels": "A. Writer."}])
    (changed,) = with_refusals(rows, tokenize_rows(rows, tokenizer), ["No idea."], seed=0)
    assert changed.fields == {"text": "Who wrote it?", "labels": "No idea."}


@pytest.mark.parametrize("row", [{"text": "A whole text."}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
def test_rows_that_ask_nothing(tokenizer, row):
    rows = load_rows([ROWS[0], row])
    with pytest.raises(DataError, match="rows, row 2: has no question to answer otherwise"):
        with_refusals(rows, tokenize_rows(rows, tokenizer), REFUSALS, seed=0)
