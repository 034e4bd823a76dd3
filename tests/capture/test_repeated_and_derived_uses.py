"""Modules called several times, parameters that arrive in disguise: rules where there are some, exact in any case."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fillm.capture import Capture, verify
from fillm.capture.combined import SummedGradients, TiedGradients
from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients
from fillm.data import collate
from tests.capture import small_models
from tests.capture.reference import ask, assert_exact, directions, reference_gradients, toy_samples
from tests.capture.small_models import VOCAB, SmallLM, small_model

BATCHES = [[3, 0, 4], [1], [5, 2]]
SAMPLES = toy_samples(vocab=VOCAB)


class Tied(SmallLM):
    """The embedding is the head as well, and a third time turns a distribution over words into a vector."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> object:
        h = torch.tanh(self.embed(input_ids).cumsum(1))
        mixed = (h @ self.embed.weight.t()).softmax(-1) @ self.embed.weight
        self.head.weight = self.embed.weight
        return type("Output", (), {"logits": self.head(self.body(h + mixed))})


def tied_model() -> nn.Module:
    model = small_model(small_models.NormsAndBiases())
    model.__class__ = Tied
    model.head.weight = model.embed.weight
    return model


def kinds_seen(model: nn.Module) -> dict[str, type]:
    """The class that carries each tensor's gradients."""
    seen: dict[str, type] = {}
    capture = Capture(model, [name for name, _ in model.named_parameters()])
    capture.run(collate(SAMPLES, [0, 1, 2]), SAMPLES, lambda name, g, _: seen.__setitem__(name, type(g)))
    return seen


def check(model: nn.Module) -> Capture:
    """Verifies, captures all samples and compares; returns the capture."""
    capture = Capture(model, [name for name, _ in model.named_parameters()])
    verify(capture, SAMPLES)
    v = directions(model)
    assert_exact(model, reference_gradients(model, SAMPLES), ask(capture, SAMPLES, BATCHES, "right", v), v)
    return capture


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (small_models.CalledTwice, {"body.linear.weight": OuterGradients, "body.norm.weight": DenseGradients}),
        (lambda: small_models.Positions(sliced=False), {"body.table.weight": LookupGradients}),
        (lambda: small_models.Positions(sliced=True), {"body.table.weight": DenseGradients}),
        (small_models.LookedUpTwice, {"body.table.weight": LookupGradients}),
        (small_models.OuterAndDense, {"body.weight": SummedGradients}),
        (small_models.Derived, {"body.matrix": OuterGradients, "body.shifted": DenseGradients}),
        (small_models.NormsAndBiases, {"body.linear.bias": DenseGradients, "body.affine.weight": DenseGradients}),
    ],
    ids=["twice", "positions", "sliced", "lookups", "outer+dense", "derived", "norms"],
)
def test_rules_cover_these_uses_exactly(body: Callable[[], nn.Module], expected: dict[str, type]) -> None:
    model = small_model(body())
    capture = check(model)
    assert capture.fallback == {}
    seen = kinds_seen(model)
    assert {name: seen[name] for name in expected} == expected


def test_embedding_that_is_head_and_mixture_as_well_is_one_tensor() -> None:
    model = tied_model()
    assert check(model).fallback == {}
    assert kinds_seen(model)["embed.weight"] is TiedGradients


def test_cross_term_of_tied_embedding_counts() -> None:
    """The norm of the sum is not the sum of the norms on this model, so a lost cross term would show."""
    model, parts = tied_model(), {}
    capture = Capture(model, ["embed.weight"])
    capture.run(collate(SAMPLES, [0, 1]), SAMPLES, lambda name, g, _: parts.__setitem__(name, g))
    tied = parts["embed.weight"]
    separate = tied.lookup.squared_norms() + tied.outer.squared_norms()
    assert bool(((tied.squared_norms() - separate).abs() > 1e-3 * separate).all())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (small_models.Einsum, {"body.weight": "no rule for einsum"}),
        (
            lambda: small_models.CausalConvolution(depthwise=False),
            {"body.conv.weight": "no rule for conv1d", "body.conv.bias": "no rule for conv1d"},
        ),
        (small_models.ProductOfParameters, {"body.left": "no rule for mul", "body.right": "no rule for mul"}),
        (small_models.WeightNorm, {"body.weight": "no rule for "}),
        (
            small_models.Keywords,
            {
                "body.bias": "no rule for add",
                "body.scale": "no rule for mul",
                "body.first": "no rule for mm",
                "body.second": "no rule for addmm",
            },
        ),
        (small_models.InPlace, {"body.bias": "no rule for add_"}),
        (small_models.HiddenFromTorchFunctions, {"body.scale": "rules differ from autograd by 1.0e+00"}),
        (
            small_models.Attention,
            {
                f"body.attention.{name}": ""
                for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
            },
        ),
    ],
    ids=["einsum", "conv1d", "product", "weight-norm", "keywords", "in place", "custom-function", "multi-head"],
)
def test_uses_without_a_rule_take_the_named_fallback_and_stay_exact(
    body: Callable[[], nn.Module], expected: dict[str, str]
) -> None:
    capture = check(small_model(body()))
    assert set(capture.fallback) == set(expected)
    for name, reason in expected.items():
        assert capture.fallback[name].startswith(reason)


def test_fallback_found_in_the_middle_of_a_run_loses_no_sample() -> None:
    """Without verification the first batch meets the operation unprepared."""
    model = small_model(small_models.Einsum())
    capture, v = Capture(model, [name for name, _ in model.named_parameters()]), directions(model)
    assert_exact(model, reference_gradients(model, SAMPLES), ask(capture, SAMPLES, BATCHES, "right", v), v)
    assert capture.fallback == {"body.weight": "no rule for einsum"}


def test_parameters_without_gradient_are_reported_unreached() -> None:
    model = small_model(small_models.Unused())
    capture = check(model)
    assert verify(capture, SAMPLES).unreached == {"body.idle", "body.cut", "body.frozen"}
    assert capture.fallback == {}
