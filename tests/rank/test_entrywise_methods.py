"""Methods that take absolute values or squares of every sample's gradient before they add up, against float64."""

import math

import pytest
import torch

from fillm import rank_parameters
from fillm.errors import UsageError
from tests.families import build_family
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, direct_of, family

# A tied embedding (two uses), fused experts (a stack), transposed matrices, biases, learned positions.
FAMILIES = ("opt", "llama-tied", "gpt2", "mixtral")
RTOL = 2e-4  # float32 gradients through a few layers, squared


def ranked(model, method, **settings):
    return rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, method, **settings)


def mean_power(gradients, tensor, power):
    return sum(one[tensor].double().abs().pow(power) for one in gradients) / len(gradients)


def assert_idle(ranking, direct):
    assert {row["name"] for row in ranking if row["note"] == "unused"} == direct.unused()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_sums_the_mean_absolute_entries(name):
    model, direct = family(name)
    ranking = rank_parameters(model, None, FORGET_ROWS, method="gradient")
    assert set(ranking.scores) == set(direct.v)
    for tensor, score in ranking.scores.items():
        want = float(mean_power(direct.f, tensor, 1).sum())
        assert score == pytest.approx(want, rel=RTOL, abs=1e-15), tensor
        # Samples do not cancel: never less than what saliency sums.
        assert score >= float(direct.v[tensor].abs().sum()) * (1 - RTOL)


@pytest.mark.parametrize("name", FAMILIES)
def test_fisher_ratio_divides_the_sums(name):
    model, direct = family(name)
    ranking = ranked(model, "fisher-ratio")
    assert_idle(ranking, direct)
    for tensor, score in ranking.scores.items():
        forget, retain = (float(mean_power(of, tensor, 2).sum()) for of in (direct.f, direct.g))
        assert score == pytest.approx(forget / retain if retain else 0.0, rel=RTOL), tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_diagonal_curvature_divides_entry_by_entry(name):
    model, direct = family(name)
    ranking = ranked(model, "soir", curvature="diagonal", save_update=True)
    assert_idle(ranking, direct)
    for row in ranking:
        tensor = row["name"]
        fisher, lambda_ = mean_power(direct.g, tensor, 2), direct.lambda_[tensor]
        u = -direct.v[tensor] / (fisher + lambda_) if lambda_ else torch.zeros_like(direct.v[tensor])
        assert float((ranking.updates[tensor] - u).norm()) <= 5 * RTOL * float(u.norm()), tensor
        assert row["score"] == row["score_low"] == row["score_high"] == pytest.approx(float(u.norm()), rel=5 * RTOL)
        assert row["damping"] == pytest.approx(lambda_, rel=RTOL)
        gain = -float((direct.v[tensor] * u).sum())
        assert row["predicted_forget_gain"] == pytest.approx(gain, rel=5 * RTOL) and gain >= 0.0


def test_rows_and_weights():
    model, direct = family("mixtral")
    tensor = "model.layers.0.self_attn.q_proj.weight"
    forget, retain = (mean_power(of, tensor, 2) for of in (direct.f, direct.g))
    by_row = ranked(model, "fisher-ratio", granularity="row", include=tensor)
    for row in by_row:
        want = float(forget[row["index"]].sum() / retain[row["index"]].sum())
        assert row["score"] == pytest.approx(want, rel=RTOL)
    weights = ranked(model, "fisher-ratio", granularity="element", include=tensor)
    torch.testing.assert_close(weights.updates[tensor].double(), forget / retain, rtol=5e-3, atol=1e-6)
    absolute = ranked(model, "gradient", granularity="row", include=tensor)
    sums = mean_power(direct.f, tensor, 1).sum(1)
    for row in absolute:
        assert row["score"] == pytest.approx(float(sums[row["index"]]), rel=RTOL)
    heads = ranked(model, "soir", curvature="diagonal", granularity="head", objective="retain")
    assert all(row["retain_damage"] >= 0 for row in heads) and len(list(heads)) > 1


def test_gradient_checkpointing_of_a_tensor_used_twice_and_no_retain_gradient():
    model = build_family("llama-tied")
    direct = direct_of(model)
    tensor = "model.embed_tokens.weight"
    want = float(mean_power(direct.f, tensor, 1).sum())
    assert ranked(model, "gradient", include=tensor).scores[tensor] == pytest.approx(want, rel=RTOL)
    one = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    found = rank_parameters(model, None, FORGET_ROWS, one, "fisher-ratio", granularity="element", include=tensor)
    ratios = found.updates[tensor]
    assert not bool(ratios.isnan().any()) and float(ratios.min()) >= 0.0 and math.isfinite(found.scores[tensor])


@pytest.mark.parametrize("method", ["soir-sum", "wagle", "gradient", "random"])
def test_curvature_belongs_to_soir(method):
    model, _ = family("opt")
    with pytest.raises(UsageError, match=f"--curvature diagonal is a choice of --method soir, not of {method}"):
        ranked(model, method, curvature="diagonal")
