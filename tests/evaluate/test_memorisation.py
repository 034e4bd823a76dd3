"""Exact memorisation and extraction strength, against a count from the definition and against real decoding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fillm.data import Sample, SampleSet
from fillm.evaluate.answer_tokens import AnswerTokens, token_pass
from fillm.evaluate.memorisation import exact_memorisation, extraction_strength, without_end
from tests.evaluate.answers import answer
from tests.families import build_family


@pytest.mark.parametrize(
    ("right", "exact", "strength"),
    [
        ([True] * 4, 1.0, 1.0),
        ([False] * 4, 0.0, 0.0),
        ([True, True, False, True, True], 0.8, 0.4),
        ([False, True, True, True], 0.75, 0.75),
        ([True, True, True, False], 0.75, 0.0),
        ([True], 1.0, 1.0),
        ([False], 0.0, 0.0),
    ],
)
def test_by_hand(right: list[bool], exact: float, strength: float) -> None:
    tokens = answer(right)
    assert exact_memorisation(tokens) == exact
    assert extraction_strength(tokens) == strength


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_from_the_definitions(right: list[bool]) -> None:
    tokens = answer(right)
    prefix = next(k for k in range(len(right) + 1) if all(right[k:]))
    assert extraction_strength(tokens) == (len(right) - prefix) / len(right)
    assert exact_memorisation(tokens) == sum(right) / len(right)
    assert extraction_strength(tokens) <= exact_memorisation(tokens)


def test_the_end_is_left_out() -> None:
    tokens = answer([True, False, True], [-1.0, -2.0, -3.0], last=2)
    short = without_end(tokens, 2)
    assert short.token_ids.tolist() == [10, 11] and short.log_probs.tolist() == [-1.0, -2.0]
    assert short.mean_log_probs is None
    assert exact_memorisation(short) == 0.5 and extraction_strength(short) == 0.0
    assert len(tokens.token_ids) == 3  # what was given is as it was


@pytest.mark.parametrize("end", [None, 7, 10])
def test_another_last_token_stays(end: int | None) -> None:
    tokens = answer([True, False], last=2)
    assert without_end(tokens, end) is tokens


def test_an_answer_of_nothing_but_its_end_stays() -> None:
    tokens = answer([True], last=2)
    assert without_end(tokens, 2) is tokens


def test_moments_are_cut_with_the_rest() -> None:
    three = np.arange(3)
    tokens = AnswerTokens(np.array([4, 5, 2]), -three - 1.0, three, three * 0.5, three * 0.25)
    short = without_end(tokens, 2)
    assert short.mean_log_probs.tolist() == [0.0, 0.5] and short.std_log_probs.tolist() == [0.0, 0.25]


def test_the_prefix_is_the_one_that_greedy_decoding_needs() -> None:
    model = build_family("llama", seed=4)

    def decode(ids: list[int], count: int) -> list[int]:
        for _ in range(count):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        return ids

    samples = []
    for number, (prompt, made_up) in enumerate([([5, 6, 7], [8, 9, 10]), ([30, 31], []), ([40], [41])]):
        ids = decode([*prompt, *made_up], 4)
        if number == 2:
            ids[-1] = (ids[-1] + 1) % 97
        samples.append(Sample(f"#{number}", tuple(ids), (*[-100] * len(prompt), *ids[len(prompt) :])))
    found = token_pass(model, SampleSet(samples, "made up"), tokens_per_batch=None)
    seen = []
    for sample, tokens in zip(samples, found, strict=True):
        ids, count = list(sample.input_ids), sample.num_counted
        begin = len(ids) - count
        prefix = next(k for k in range(count + 1) if decode(ids[: begin + k], count - k) == ids)
        seen.append(extraction_strength(tokens))
        assert seen[-1] == (count - prefix) / count
    assert seen[0] >= 4 / 7 and seen[1] == 1.0 and seen[2] == 0.0
