"""Every family, every layout, every tensor, every question, against float64 batch-1 autograd."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fillm.capture import Capture, verify
from fillm.data import SampleSet
from fillm.errors import UsageError
from tests.capture.reference import (
    Answers,
    ask,
    assert_exact,
    directions,
    reference_gradients,
    sample_loss,
    toy_samples,
)
from tests.families import FAMILIES, build_family

BATCHES = [[4, 0, 5, 2], [1, 3]]
# Learned positions that start anew at every sample do not reach this model: it counts positions from the mask.
NOT_PACKED = ("opt",)
# Keys without rotary positions: a shift of all keys changes no attention weight.
NO_KEY_BIAS_GRADIENT = {"opt": [f"model.decoder.layers.{i}.self_attn.k_proj.bias" for i in range(2)]}


@dataclass
class Case:
    name: str
    model: PreTrainedModel
    samples: SampleSet
    references: list[dict[str, Tensor]]
    v: dict[str, Tensor]
    captures: dict[str, Capture]
    answers: dict[str, Answers]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    model, samples = build_family(request.param), toy_samples()
    v, captures, answers = directions(model), {}, {}
    for layout in ("right", "left", "packed"):
        if layout == "packed" and request.param in NOT_PACKED:
            continue
        captures[layout] = Capture(model, [name for name, _ in model.named_parameters()])
        answers[layout] = ask(captures[layout], samples, BATCHES, layout, v)
    return Case(request.param, model, samples, reference_gradients(model, samples), v, captures, answers)


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_every_tensor_of_every_sample_equals_float64_autograd(case: Case, layout: str) -> None:
    if layout not in case.answers:
        with pytest.raises(
            UsageError, match=r"--layout packed: sample toy#\d has loss .* alone and .* use --layout right"
        ):
            verify(Capture(case.model, ["model.decoder.embed_tokens.weight"]), case.samples, layout)
        return
    zero = NO_KEY_BIAS_GRADIENT.get(case.name, ())
    assert_exact(case.model, case.references, case.answers[layout], case.v, tolerance=2e-5, zero=zero)
    assert set(case.answers[layout].of) == {
        (name, i) for name, _ in case.model.named_parameters() for i in range(len(case.samples))
    }


def test_no_tensor_takes_the_fallback(case: Case) -> None:
    for layout, capture in case.captures.items():
        assert capture.fallback == {}, layout


def test_losses_are_the_samples_own(case: Case) -> None:
    twin = build_family(case.name, dtype=torch.float64)
    with torch.no_grad():
        expected = [float(sample_loss(twin, sample)) for sample in case.samples]
    for answers in case.answers.values():
        got = [answers.losses[i] for i in range(len(case.samples))]
        assert got == pytest.approx(expected, rel=2e-6)


def test_verification_agrees_and_reaches_every_tensor(case: Case) -> None:
    capture = Capture(case.model, [name for name, _ in case.model.named_parameters()])
    found = verify(capture, case.samples)
    assert capture.fallback == {} and found.unreached == set()
    assert set(found.error) == set(capture.parameters)
    assert max(found.error.values()) < 1e-4
