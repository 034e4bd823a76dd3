"""What of a row becomes prompt and what counts, in every form of row and template; what is wrong with a row."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fillm.data import DEFAULT_TEMPLATE, Row, SampleSet, load_rows, tokenize_rows
from fillm.errors import DataError, ModelError, UsageError
from tests.data.byte_tokenizer import build_tokenizer

Split = Callable[[Any, Any], tuple[str, str]]
QA = {"question": "Who?", "answer": "She."}


def tokenize(fields: dict[str, Any], tokenizer: Any, **options: Any) -> SampleSet:
    return tokenize_rows([Row(fields, "set", 0)], tokenizer, **options)


@pytest.mark.parametrize(
    ("fields", "template", "prompt", "answer"),
    [
        (QA, DEFAULT_TEMPLATE, "<s>Question: Who?\nAnswer:", " She.</s>"),
        ({"text": "Who?", "labels": "She."}, DEFAULT_TEMPLATE, "<s>Question: Who?\nAnswer:", " She.</s>"),
        (
            QA | {"text": "ignored", "perturbed_answer": ["He."]},
            DEFAULT_TEMPLATE,
            "<s>Question: Who?\nAnswer:",
            " She.</s>",
        ),
        ({"text": "A passage."}, DEFAULT_TEMPLATE, "<s>", "A passage."),
        (QA, "{question}", "<s>Who?", " She.</s>"),
        (QA, "Q: {question} A: ", "<s>Q: Who? A:", " She.</s>"),
        (QA, "[INST] {question} [/INST]{answer}", "<s>[INST] Who? [/INST]", "She.</s>"),
        (QA, r"{question}\n{answer}<end>", "<s>Who?\n", "She.<end></s>"),
        (QA, "{{json}} {question} {0}", "<s>{{json}} Who? {0}", " She.</s>"),
        (
            {"question": "{answer} {x}", "answer": "{question}"},
            DEFAULT_TEMPLATE,
            "<s>Question: {answer} {x}\nAnswer:",
            " {question}</s>",
        ),
    ],
)
def test_prompt_and_answer(
    fields: dict[str, Any], template: str, prompt: str, answer: str, tokenizer: Any, counted_text: Split
) -> None:
    samples = tokenize(fields, tokenizer, template=template)
    assert counted_text(samples[0], tokenizer) == (prompt, answer)
    assert samples[0].labels[0] == -100


def test_the_chat_template_writes_its_own_special_tokens(make_tokenizer: Any, counted_text: Split) -> None:
    tokenizer = make_tokenizer(chat=True)
    samples = tokenize(QA, tokenizer, template="chat")
    assert counted_text(samples[0], tokenizer) == ("<s><user>Who?<end><assistant>", "She.</s>")
    with pytest.raises(ModelError, match="--template chat: this tokenizer has no chat template"):
        tokenize(QA, make_tokenizer(), template="chat")
    tokenizer.chat_template = "{{ raise_exception('no user turns here') }}"
    with pytest.raises(ModelError, match=r"chat template fails .*no user turns here"):
        tokenize(QA, tokenizer, template="chat")


def test_special_tokens_are_the_tokenizers_own(make_tokenizer: Any, counted_text: Split) -> None:
    for options, bos in (
        ({"bos": False}, ""),
        ({"appends_eos": True}, "<s>"),
        ({"bos": False, "appends_eos": True}, ""),
    ):
        tokenizer = make_tokenizer(**options)
        prompt, answer = counted_text(tokenize(QA, tokenizer)[0], tokenizer)
        assert (prompt, answer) == (f"{bos}Question: Who?\nAnswer:", " She.</s>")
    assert tokenize({"text": "x"}, make_tokenizer(eos=False)).num_tokens == 2
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        tokenize(QA, make_tokenizer(eos=False))


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("no place", "write {question} once"),
        ("{question} {question}", "write {question} once"),
        ("{question} {answer} {answer}", "{answer} at most once"),
        ("{answer} {question}", "{answer} has to come after {question}"),
    ],
)
def test_a_template_that_is_none(template: str, part: str, tokenizer: Any) -> None:
    with pytest.raises(UsageError) as error:
        tokenize(QA, tokenizer, template=template)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"question": "Who?"}, "no field 'answer'; this row has question"),
        ({"answer": "She."}, "no field 'question'; a row has question + answer, text + labels"),
        ({"labels": "She."}, "no field 'text'"),
        ({"prompt": "Who?", "response": "x"}, "input_ids + labels, this one has prompt, response"),
        ({}, "this one has no fields"),
        ({"question": 3, "answer": "She."}, "field 'question' has to be text, not int"),
        ({"question": "Who?", "answer": None}, "field 'answer' has to be text, not NoneType"),
        ({"question": "Who?", "answer": ["She."]}, "field 'answer' has to be text, not list"),
        ({"question": "Who?", "answer": " \n"}, "field 'answer' is empty"),
        ({"question": "", "answer": "She."}, "field 'question' is empty"),
        ({"text": "Who?", "labels": ""}, "field 'labels' is empty"),
        ({"text": "\ud800"}, "field 'text' holds half a surrogate pair"),
        ({"input_ids": [1, 2]}, "no field 'labels'; this row has input_ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "field 'labels' has 1 entries, 'input_ids' has 2"),
        ({"input_ids": "1 2", "labels": [1, 2]}, "field 'input_ids' has to be a list of token ids, not str"),
        ({"input_ids": [1, 2.0], "labels": [1, 2]}, "field 'input_ids'[1] is 2.0; token ids are whole numbers"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "field 'input_ids'[1] is True"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "field 'labels'[1] is 3; it has to be -100 or the token id 2"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "field 'labels' has no token that counts"),
        ({"input_ids": [], "labels": []}, "field 'labels' has no token that counts"),
        (
            {"input_ids": [1, 258], "labels": [1, 258]},
            "token id 258 at position 1 is outside the vocabulary of 258 ids",
        ),
        ({"input_ids": [1, -1], "labels": [1, -1]}, "token id -1 at position 1 is negative"),
    ],
)
def test_a_bad_row_is_named_with_source_row_and_field(fields: dict[str, Any], part: str, tokenizer: Any) -> None:
    rows = [Row(QA, "file.jsonl", 0, 1), Row(fields, "file.jsonl", 1, 4), Row({}, "file.jsonl", 2, 5)]
    with pytest.raises(DataError) as error:
        tokenize_rows(rows, tokenizer)
    assert part in str(error.value)
    assert str(error.value).startswith("file.jsonl, line 4: ")
    assert str(error.value).endswith("leave such rows out with --skip-bad-rows")
    samples = tokenize_rows(rows, tokenizer, skip_bad_rows=True)
    assert [sample.id for sample in samples] == ["file.jsonl#0"]
    assert [where for where, _ in samples.skipped] == ["file.jsonl, line 4", "file.jsonl, line 5"]
    with pytest.raises(DataError, match=r"file.jsonl: none of 2 rows can be used; the first: file.jsonl, line 4: "):
        tokenize_rows(rows[1:], tokenizer, skip_bad_rows=True)


def test_the_first_bad_row_is_the_one_named(tokenizer: Any) -> None:
    late_fault = Row({"text": "\N{PILE OF POO}"}, "set", 0)  # four tokens of a vocabulary too small for them
    with pytest.raises(DataError, match=r"set, row 1: token id \d+ at position 0 is outside the vocabulary of 3 ids"):
        tokenize_rows([late_fault, Row({}, "set", 1)], tokenizer, vocab_size=3)


def test_a_passage_needs_something_to_predict_from(make_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="set, row 1: field 'text' has no token that counts"):
        tokenize({"text": "x"}, make_tokenizer(bos=False))
    assert tokenize({"text": "xy"}, make_tokenizer(bos=False))[0].num_counted == 1


def test_ready_made_rows_need_no_tokenizer() -> None:
    ids, labels = [5, 6, 7], [-100, 6, 7]
    for make in (list, tuple, numpy.array, torch.tensor):
        samples = tokenize({"input_ids": make(ids), "labels": make(labels)}, None)
        assert samples[0].input_ids == (5, 6, 7)
        assert samples[0].labels == (-100, 6, 7)
        assert all(type(token) is int for token in samples[0].input_ids)
    all_count = tokenize({"input_ids": ids, "labels": ids}, None)
    assert all_count[0].labels == (-100, 6, 7)  # nothing predicts the first token
    with pytest.raises(DataError, match="outside the vocabulary of 7 ids"):
        tokenize({"input_ids": ids, "labels": labels}, None, vocab_size=7)
    for size in (None, 7):
        with pytest.raises(DataError, match="token id -6 at position 1 is negative; token ids begin at 0"):
            tokenize({"input_ids": [5, -6], "labels": [-100, -6]}, None, vocab_size=size)
    with pytest.raises(UsageError, match="set, row 1: text needs a tokenizer"):
        tokenize(QA, None)


def test_arguments_out_of_range(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="--max-length 1: give at least 2"):
        tokenize(QA, tokenizer, max_length=1)
    with pytest.raises(DataError, match="mine: holds no rows"):
        tokenize_rows([], tokenizer, source="mine")


ALPHABET = st.text("abcdefgh ?\n", min_size=1, max_size=30).filter(str.strip)
TOKENIZERS = {bos: build_tokenizer(bos=bos) for bos in (True, False)}


@given(question=ALPHABET, answer=ALPHABET, limit=st.integers(2, 90), bos=st.booleans())
def test_truncation_law(question: str, answer: str, limit: int, bos: bool) -> None:
    """One byte is one token, so the expectation is written on bytes."""
    tokenizer: PreTrainedTokenizerFast = TOKENIZERS[bos]
    samples = tokenize({"question": question, "answer": answer}, tokenizer, max_length=limit)
    prompt, reply = f"Question: {question}\nAnswer:", len(f" {answer}") + 1  # the last is the end of the sequence
    front = 1 if bos else 0
    room = max(limit - front - reply, 1 - front)  # for the prompt; the answer is predicted from at least one token
    prompt = prompt[-room:] if room else ""
    expected = tokenizer(f"{'<s>' * front}{prompt} {answer}</s>", add_special_tokens=False)["input_ids"][:limit]
    context = front + len(prompt)
    assert list(samples[0].input_ids) == expected
    assert list(samples[0].labels) == [-100] * context + expected[context:]
    assert samples[0].num_counted >= 1
    assert samples[0].num_tokens <= limit
    assert samples.shortened == (["set#0"] if samples[0].num_counted < reply else [])


@given(
    labels=st.lists(st.booleans(), min_size=2, max_size=12).filter(lambda flags: any(flags[1:])),
    limit=st.integers(2, 14),
    begins=st.booleans(),
)
def test_truncation_of_ready_made_rows_keeps_the_first_counted_token(
    labels: list[bool], limit: int, begins: bool
) -> None:
    ids = [256 if begins else 1, *range(2, len(labels) + 1)]
    row = {"input_ids": ids, "labels": [token if counts else -100 for token, counts in zip(ids, labels, strict=True)]}
    sample = tokenize(row, TOKENIZERS[True], max_length=limit)[0]
    first = next(ids[position] for position in range(1, len(ids)) if labels[position])
    assert first in sample.labels
    assert sample.input_ids[0] == ids[0] or not begins  # the special token in front stays
    assert sample.num_tokens == min(limit, len(ids))
    assert list(sample.input_ids) == [token for token in ids if token in sample.input_ids]
    dropped = [token for token in ids if token not in sample.input_ids]
    assert all(token < first or token > sample.input_ids[-1] for token in dropped)
    if any(token > sample.input_ids[-1] for token in dropped):  # the answer gives way only when the prompt is gone
        assert sample.input_ids[1] == first  # but for the one token that the answer is predicted from


def test_a_long_front_leaves_no_room_for_the_answer(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="<s> <s> <s> $A", special_tokens=[("<s>", 256)]
    )
    with pytest.raises(DataError, match="set, row 1: field 'answer' has no token left after truncation to 3 tokens"):
        tokenize(QA, tokenizer, max_length=3)
    assert tokenize(QA, tokenizer, max_length=4)[0].num_counted == 1


def test_fictional_rows_are_tokenised_whole(tokenizer: Any) -> None:
    rows = load_rows("fictional-small:forget05")
    samples = tokenize_rows(rows, tokenizer)
    assert len(samples) == 40
    assert samples.source == "fictional-small:forget05"
    assert samples.shortened == []
    assert samples[0].id == "fictional-small:forget05#0"
