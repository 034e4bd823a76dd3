"""The closed-form step on a model that recites its rows: what was predicted of it, how far it goes, what is said."""

from fractions import Fraction
from math import isqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fillm
from fillm.capture import sample_losses
from fillm.data import collate
from fillm.errors import UsageError
from fillm.unlearn import influence
from fillm.unlearn.influence import Expansion, OneShot
from fillm.unlearn.results import _predicted_lines
from tests.families import build_family
from tests.unlearn.test_command_pieces import drawn_samples


@given(st.integers(-1000, 1000), st.integers(-1000, 1000), st.sampled_from([0.125, 1.0, 8.0]))
def test_the_step_to_a_rise_is_the_smallest(slope, curvature, rise):
    """The quadratic's positive roots, by the textbook and in fractions up to the last root."""
    eta = Expansion(float(slope), float(curvature), 0.0).step_to(rise)
    square = Fraction(slope) ** 2 + 2 * Fraction(curvature) * Fraction(rise)
    if curvature == 0:
        wanted = [Fraction(rise) / slope] if slope > 0 else []
    elif square < 0:
        wanted = []
    else:
        root = Fraction(isqrt(int(square * 10**60))) / 10**30
        wanted = [found for sign in (1, -1) if (found := (sign * root - slope) / curvature) > 0]
    assert (eta is None) == (not wanted)
    if wanted:
        assert eta == pytest.approx(float(min(wanted)), rel=1e-9)


@pytest.mark.parametrize(
    ("curvature", "eta", "said"),
    [
        (0.0, 0.01, None),
        (80.0, (2.6**0.5 - 1) / 80, None),
        (1000.0, 0.002, "eta is 0.002, for a predicted forget rise of 0.004: at 0.00358, for 0.01, curvature would"),
    ],
)
def test_the_default_step(curvature, eta, said):
    """Of a forget slope of 1: to a rise of 0.01, but not beyond where curvature outweighs the slope."""
    notes, forget = [], Expansion(1.0, curvature, 0.0)
    found = influence._default_step(forget, notes.append)
    assert found == pytest.approx(eta)
    assert not forget.doubtful(found)
    assert forget.doubtful(1.001 * found) == (said is not None)
    assert [note[: len(said)] for note in notes] == ([said] if said else [])


@pytest.mark.parametrize(
    ("expansion", "words"),
    [
        (Expansion(-1.0, 500.0, 1.0), "no step along u raises the forget loss"),
        (Expansion(1.0, -500.0, 1.0), "by 0.01; it is highest at --eta 0.002, by 0.001; give --eta"),
    ],
)
def test_a_rise_that_is_never_reached(expansion, words):
    with pytest.raises(UsageError) as raised:
        influence._default_step(expansion, pytest.fail)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_said():
    trusted = OneShot(0.1, Expansion(1.0, 2.0, 4.0), Expansion(-1.0, 8.0, 0.0), "two backward passes")
    lines = _predicted_lines(trusted, {"forget": 0.111, "retain": -0.05})
    assert lines[0] == "step theta - 0.1 u; change of the loss, measured and predicted:"
    assert lines[2].split() == ["forget", "+0.111", "+0.11", "+0.1", "+0.12"]
    assert lines[3].split() == ["retain", "-0.05", "-0.06", "-0.1", "-0.1"]
    assert len(lines) == 4
    bent = OneShot(0.1, Expansion(1.0, 2.0, 4.0), Expansion(-1.0, 21.0, 0.0), "central differences")
    lines = _predicted_lines(bent, {"forget": 0.1, "retain": 0.1})
    assert lines[4].startswith("doubtful: the second-order part of the retain change is larger than the first")
    assert lines[5] == "curvature by central differences"


@pytest.fixture(scope="module")
def reciting():
    """A model trained until it recites all rows, and its ranking with `u`."""
    model, forget, retain = build_family("llama", seed=5), drawn_samples(4, 51), drawn_samples(12, 32)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    batches = [collate(samples, list(range(len(samples)))) for samples in (forget, retain)]
    for _ in range(400):
        losses = torch.cat([sample_losses(model, batch) for batch in batches])
        if float(losses.detach().mean()) < 0.02:
            break
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert float(losses.detach().mean()) < 0.02
    model.requires_grad_(False)
    return model, _rows(forget), _rows(retain)


def _rows(samples):
    return [{"input_ids": list(one.input_ids), "labels": list(one.labels)} for one in samples]


def test_measured_as_predicted(reciting):
    """At the default step, where (8) has the sign of the retain change wrong, and at a tenth of it."""
    model, forget, retain = reciting
    before = {name: value.clone() for name, value in model.named_parameters()}
    ranking = fillm.rank_parameters(model, None, forget, retain, method="soir", save_update=True)
    given = {"ranking": ranking, "select": "top:0.3:tensors", "include": "mlp,attn", "loss": "influence"}
    eta = None
    for length in (1.0, 0.1):
        result = fillm.unlearn_model(model, None, forget, retain, **given, eta=eta)
        for name, value in model.named_parameters():
            value.data = before[name].clone()
        assert len(result.mask) > 1
        told = result.as_json()["influence"]
        for which in ("forget_change", "retain_change"):
            change = told[which]
            assert change["measured"] == pytest.approx(change["predicted"], rel=0.2)
        assert told["forget_change"]["measured"] > 0 and not told["forget_change"]["doubtful"]
        if length == 1.0:
            assert told["forget_change"]["fisher"] < 0.7 * told["forget_change"]["measured"]
            assert told["retain_change"]["fisher"] < 0 < told["retain_change"]["measured"]
            eta = told["eta"] / 10
