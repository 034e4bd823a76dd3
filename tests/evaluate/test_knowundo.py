"""KnowUnDo's scores by hand."""

import math

import numpy as np
import pytest

from fillm.data.published import _KNOWUNDO_SPLITS
from fillm.errors import DataError, UsageError
from fillm.evaluate.knowundo import Scores, splits_of, summary
from tests.evaluate.answers import answer


def test_summary_by_hand() -> None:
    unlearn = Scores.of(
        [answer([True, False], [math.log(0.25), math.log(0.25)]), answer([False], [math.log(0.5)])], [0.5, 0.1]
    )
    retention = Scores.of([answer([True, True, False, False], [math.log(0.8)] * 4)], [0.9])
    found = summary(unlearn, retention)
    expected = {
        "unlearn_probability": 0.375,
        "retention_probability": 0.8,
        "unlearn_rouge_l_recall": 0.3,
        "retention_rouge_l_recall": 0.9,
        "unlearn_accuracy": 0.25,
        "retention_accuracy": 0.5,
        "unlearn_success_probability": 0.625,
        "retention_success_probability": 0.8,
        "success_probability": 0.7125,
        "unlearn_success_rouge_l_recall": 0.7,
        "retention_success_rouge_l_recall": 0.9,
        "success_rouge_l_recall": 0.8,
        "unlearn_success_accuracy": 0.75,
        "retention_success_accuracy": 0.5,
        "success_accuracy": 0.625,
        "unlearn_perplexity": math.sqrt(8.0),  # exp of the mean of log 4 and log 2
        "retention_perplexity": 1.25,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_what_was_not_generated_is_null() -> None:
    scores = Scores.of([answer([True], [-1.0])])
    found = summary(scores, Scores.of([answer([True], [-1.0])], [1.0]))
    assert found["unlearn_rouge_l_recall"] is None and found["unlearn_success_rouge_l_recall"] is None
    assert found["retention_success_rouge_l_recall"] == 1.0 and found["success_rouge_l_recall"] is None
    assert found["success_probability"] == pytest.approx(0.5)


def test_a_perplexity_beyond_numbers_is_null() -> None:
    scores = Scores.of([answer([False], [-1000.0])], [0.0])
    assert scores.perplexity is None and scores.probability[0] == 0.0
    assert Scores.of([answer([False], [-709.0])]).perplexity == pytest.approx(math.exp(709.0))


def test_the_order_of_rows_does_not_matter() -> None:
    draw = np.random.default_rng(1)
    rows = [(answer(draw.integers(0, 2, 4) == 1, -draw.random(4) * 9), draw.random()) for _ in range(17)]
    there, back = (Scores.of(*zip(*order, strict=True)) for order in (rows, rows[::-1]))
    assert summary(there, there) == summary(back, back)  # to the bit


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        Scores.of([])


@pytest.mark.parametrize(
    ("forget", "subset"), [("privacy", "val"), ("privacy/unlearn_val", "val"), ("privacy/unlearn_train", "train")]
)
def test_splits(forget: str, subset: str) -> None:
    found = splits_of(forget)
    assert found == (f"knowundo:privacy/unlearn_{subset}", f"knowundo:privacy/retention_{subset}")
    assert {spec.partition(":")[2] for spec in found} <= set(_KNOWUNDO_SPLITS)


@pytest.mark.parametrize("forget", ["forget01", "privacy/retention_val", "privacy/", "copyrights"])
def test_other_splits_are_refused(forget: str) -> None:
    with pytest.raises(UsageError, match=f"--forget {forget}: of KnowUnDo give"):
        splits_of(forget)
