"""The gradient-norm attack against plain autograd in float64."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fillm.data import SampleSet
from fillm.errors import ModelError, NumericsError, UsageError
from fillm.evaluate.gradient_norm import gradient_norms
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from tests.evaluate.answers import random_samples
from tests.families import build_family

# Relative. Where positions are rotary, their sines and cosines are float32 in a model of any dtype, and
# on some processors their last bit goes by how many are computed at once, so by padding: 2^-24 a layer, some times.
ROUNDING = {"gpt2": 1e-9, "llama": 4e-6, "llama-tied": 4e-6}


def passes(**settings: int) -> Passes:
    return Passes(Console.silent(), **settings)


def slow_norms(model: nn.Module, samples: SampleSet, wanted: str = "") -> list[float]:
    """Autograd's gradient of each sample's mean loss, one at a time, over tensors with `wanted` in their name."""
    model = copy.deepcopy(model).requires_grad_(True)
    out = []
    for sample in samples:
        model.zero_grad()
        logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
        nn.functional.cross_entropy(logits, torch.tensor(sample.labels[1:])).backward()
        gradients = [p.grad for name, p in model.named_parameters() if wanted in name and p.grad is not None]
        out.append(float(sum(gradient.square().sum() for gradient in gradients)) ** 0.5)
    return out


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_against_autograd(family: str) -> None:
    model = build_family(family, dtype=torch.float64)
    sets = {"forget": random_samples(7, seed=1), "holdout": random_samples(4, seed=2)}
    found = gradient_norms(model, sets, passes())
    assert list(found) == ["forget", "holdout"]
    for which, samples in sets.items():
        assert found[which].dtype == np.float64
        np.testing.assert_allclose(found[which], slow_norms(model, samples), rtol=ROUNDING[family])


def test_chosen_tensors() -> None:
    model = build_family("llama", dtype=torch.float64)
    samples = random_samples(5, seed=3)
    found = gradient_norms(model, {"all": samples}, passes(), include="*down_proj*")["all"]
    np.testing.assert_allclose(found, slow_norms(model, samples, "down_proj"), rtol=ROUNDING["llama"])


def test_batches_and_order_do_not_matter() -> None:
    model = build_family("llama")
    samples = random_samples(9, seed=4)
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    one = gradient_norms(model, {"all": samples}, passes(tokens_per_batch=1))["all"]
    many = gradient_norms(model, {"all": samples.subset(order)}, passes())["all"]
    np.testing.assert_allclose(many, one[order], rtol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = build_family("llama").train()
    model.lm_head.weight.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    gradient_norms(model, {"all": random_samples(3, seed=5)}, passes())
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name == "lm_head.weight") and parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_a_spoilt_gradient_names_its_sample() -> None:
    model = build_family("llama")
    samples = list(random_samples(6, seed=6))
    samples[4] = replace(samples[4], input_ids=(1, *samples[4].input_ids[1:]))  # no other has token 1
    model.model.embed_tokens.weight.data[1] = float("nan")
    with pytest.raises(NumericsError, match="made up#4"):
        gradient_norms(model, {"all": SampleSet(samples, "made up")}, passes(tokens_per_batch=1))


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="matches no tensor"):
        gradient_norms(build_family("llama"), {"all": random_samples(2, seed=7)}, passes(), include="*nothing*")


def test_a_model_without_gradients_is_refused() -> None:
    with torch.inference_mode():
        model = build_family("llama")
    with pytest.raises(ModelError, match="inference_mode"):
        gradient_norms(model, {"all": random_samples(2, seed=8)}, passes())
