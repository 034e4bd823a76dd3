"""Membership inference: scores against a slow restatement, areas against a count of all pairs."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fillm.data import SampleSet
from fillm.errors import DataError, NumericsError
from fillm.evaluate.answer_tokens import token_pass
from fillm.evaluate.membership import (
    auc,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    privacy_leakage,
    reference_scores,
    zlib_score,
)
from tests.evaluate.answers import likely, random_samples, slow_log_probs
from tests.families import build_family

few_values = st.lists(st.integers(0, 4).map(float), min_size=1, max_size=9)  # few, so that many are equal


def counted(members: list[float], holdout: list[float]) -> float:
    """The area from all pairs."""
    pairs = [1.0 if h > m else 0.5 if h == m else 0.0 for m in members for h in holdout]
    return sum(pairs) / len(pairs)


@given(few_values, few_values)
def test_area_is_a_count_of_pairs(members: list[float], holdout: list[float]) -> None:
    found = auc(members, holdout)
    assert found.value == counted(members, holdout)
    assert (found.num_members, found.num_holdout) == (len(members), len(holdout))
    assert auc(holdout, members).value == pytest.approx(1.0 - found.value, abs=1e-15)


@given(few_values.filter(lambda x: len(x) > 1), few_values.filter(lambda x: len(x) > 1))
def test_standard_error_from_the_definition(members: list[float], holdout: list[float]) -> None:
    """DeLong et al. 1988: S10 / m + S01 / n, sums over rows of the squared distance of their own area."""
    area, m, n = counted(members, holdout), len(members), len(holdout)
    s10 = sum((counted([x], holdout) - area) ** 2 for x in members) / (m - 1)
    s01 = sum((counted(members, [y]) - area) ** 2 for y in holdout) / (n - 1)
    assert auc(members, holdout).standard_error == pytest.approx(math.sqrt(s10 / m + s01 / n), abs=1e-12)


def test_area_by_hand() -> None:
    found = auc([1.0, 2.0], [3.0, 2.0])
    assert found.value == 0.875  # three of four pairs in order, one tie
    assert found.standard_error == pytest.approx(math.sqrt(0.03125))


def test_equal_scores_tell_nothing() -> None:
    found = auc([2.5] * 5, [2.5] * 3)
    assert (found.value, found.standard_error) == (0.5, 0.0)


def test_sets_that_come_apart() -> None:
    assert auc([1.0, 2.0], [3.0, 4.0, math.inf]).value == 1.0
    assert auc([3.0, 4.0], [1.0, 2.0]).value == 0.0


def test_one_row_has_no_spread() -> None:
    assert auc([1.0], [0.0, 2.0]).standard_error is None
    assert auc([1.0, 0.0], [2.0]).standard_error is None


@pytest.mark.parametrize(("members", "holdout"), [([], [1.0]), ([1.0], []), ([], [])])
def test_a_set_without_rows_is_an_error(members: list[float], holdout: list[float]) -> None:
    with pytest.raises(DataError, match=f"here are {len(members)} and {len(holdout)}"):
        auc(members, holdout)


@pytest.mark.parametrize(("members", "holdout"), [([1.0, math.nan], [1.0]), ([1.0], [math.nan])])
def test_nan_is_an_error(members: list[float], holdout: list[float]) -> None:
    with pytest.raises(NumericsError, match="NaN"):
        auc(members, holdout)


def test_order_and_scale_do_not_matter() -> None:
    draw = np.random.default_rng(3)
    members, holdout = draw.normal(0, 1, 41), draw.normal(0.4, 1, 23)
    found = auc(members, holdout)
    assert auc(draw.permutation(members), draw.permutation(holdout)) == found  # to the bit
    assert auc(np.exp(members), np.exp(holdout)) == found


def test_standard_error_is_the_spread_of_repetitions() -> None:
    draw = np.random.default_rng(5)
    repeated = [auc(draw.normal(0, 1, 60), draw.normal(0.7, 1, 40)) for _ in range(300)]
    spread = np.std([one.value for one in repeated])
    assert np.mean([one.standard_error for one in repeated]) == pytest.approx(spread, rel=0.15)


def test_given_scores_are_left_as_they_are() -> None:
    members, holdout = np.array([3.0, 1.0]), np.array([2.0, 0.0])
    auc(members, holdout)
    assert members.tolist() == [3.0, 1.0] and holdout.tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("unlearned", "retained", "percent"),
    [(0.5, 0.5, 0.0), (1.0, 0.5, -100.0), (1.0, 0.6, -100.0), (0.25, 0.5, 50.0), (0.0, 0.5, 100.0), (0.6, 0.0, -60.0)],
)
def test_privacy_leakage_by_hand(unlearned: float, retained: float, percent: float) -> None:
    assert privacy_leakage(unlearned, retained) == pytest.approx(percent)
    a, r = 1.0 - unlearned, 1.0 - retained  # as published: areas of the attack that takes high scores for members
    assert privacy_leakage(unlearned, retained) == pytest.approx(100.0 * (a - r) / r)


def test_privacy_leakage_of_a_known_retain_model_is_not_defined() -> None:
    assert privacy_leakage(0.5, 1.0) is None


def test_min_k_by_hand() -> None:
    tokens = likely(-1.0, -5.0, -2.0, -4.0, -3.0)
    assert min_k_score(tokens, 0.4) == 4.5
    assert min_k_score(tokens, 0.59) == 4.5
    assert min_k_score(tokens, 0.6) == 4.0
    assert min_k_score(tokens, 1.0) == loss_score(tokens) == 3.0
    assert min_k_score(tokens, 0.01) == 5.0  # one token at least


def test_min_k_of_one_token() -> None:
    assert min_k_score(likely(-0.25)) == 0.25


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 29), (0.57, 57), (0.1, 10), (0.005, 1)])
def test_the_fraction_means_what_it_says(fraction: float, count: int) -> None:
    """0.29 * 100 is 28.999999999999996 in binary arithmetic."""
    score = min_k_score(likely(*[-float(t) for t in range(1, 101)]), fraction)
    assert score == pytest.approx(np.mean(range(101 - count, 101)))


def test_min_k_plus_plus_by_hand() -> None:
    tokens = likely(-1.0, -4.0, -2.0, means=[-2.0, -2.0, -2.0], stds=[0.5, 2.0, 1.0])
    assert min_k_plus_plus_score(tokens, 0.4) == 1.0  # (-4 + 2) / 2
    assert min_k_plus_plus_score(tokens, 0.7) == 0.5  # and (-2 + 2) / 1
    assert min_k_plus_plus_score(tokens, 1.0) == pytest.approx(-1 / 3)  # and (-1 + 2) / 0.5


def test_min_k_plus_plus_of_a_certain_model_is_finite() -> None:
    assert min_k_plus_plus_score(likely(0.0, means=[0.0], stds=[0.0])) == 0.0
    assert min_k_plus_plus_score(likely(-3.0, means=[0.0], stds=[0.0])) == pytest.approx(3000.0)


def test_min_k_plus_plus_without_moments_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="vocabulary_moments"):
        min_k_plus_plus_score(likely(-1.0))


def test_zlib_by_hand() -> None:
    tokens = likely(-1.0, -3.0)
    plain, rich = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "Zoë Ångström schläft über Öfen ..."
    for text in (plain, rich, ""):
        assert zlib_score(tokens, text) == 2.0 / len(zlib.compress(text.encode()))
    assert zlib_score(tokens, plain) > zlib_score(tokens, rich)


def test_reference_scores_by_hand() -> None:
    assert reference_scores([1.0, 2.0], [0.5, 3.0]).tolist() == [0.5, -1.0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_against_logits_row_by_row(family: str) -> None:
    model = build_family(family, dtype=torch.float64)
    samples = random_samples(11, seed=1)
    assert 1 in {sample.num_counted for sample in samples}
    found = token_pass(model, samples, tokens_per_batch=40, vocabulary_moments=True)
    for sample, tokens in zip(samples, found, strict=True):
        rows = slow_log_probs(model, sample)
        labels = [label for label in sample.labels if label != -100]
        own = [float(row[label]) for row, label in zip(rows, labels, strict=True)]
        means = [float((np.exp(row) * row).sum()) for row in rows]
        stds = [
            math.sqrt(float((np.exp(row) * (row - mean) ** 2).sum())) for row, mean in zip(rows, means, strict=True)
        ]
        z = [(a - mean) / std for a, mean, std in zip(own, means, stds, strict=True)]
        count = max(1, int(0.4 * len(own) + 1e-12))
        assert loss_score(tokens) == pytest.approx(-sum(own) / len(own), rel=1e-9)
        assert min_k_score(tokens) == pytest.approx(-sum(sorted(own)[:count]) / count, rel=1e-9)
        assert min_k_plus_plus_score(tokens) == pytest.approx(-sum(sorted(z)[:count]) / count, rel=1e-9, abs=1e-9)


def test_members_of_a_trained_model_are_known() -> None:
    members, holdout = random_samples(10, seed=2), random_samples(10, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_family("llama")
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            for sample in members:
                ids, labels = (torch.tensor([some]) for some in (sample.input_ids, sample.labels))
                model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def scores(samples: SampleSet) -> list[list[float]]:
        found = token_pass(model, samples, tokens_per_batch=None, vocabulary_moments=True)
        return [[score(tokens) for tokens in found] for score in (loss_score, min_k_score, min_k_plus_plus_score)]

    for known, unknown in zip(scores(members), scores(holdout), strict=True):
        assert auc(known, unknown).value > 0.95
        assert auc(unknown, known).value < 0.05  # a forget set that looks stranger than what was never seen
