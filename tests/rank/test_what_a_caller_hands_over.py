"""What the caller of `rank_parameters` hands over: modes of torch, models without a backward pass, unloaded things."""

from pathlib import Path

import pytest
import torch

from fillm import rank_parameters
from fillm.errors import ModelError, UsageError
from tests.families import build_family
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, family


def ranked(model, **settings):
    return rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, **settings)


def test_inference_mode_of_the_caller_changes_nothing():
    model = build_family("llama")
    expected = ranked(model, save_update=True)
    with torch.inference_mode():
        found = ranked(model, save_update=True)
        assert torch.is_inference_mode_enabled()
    assert found.scores == expected.scores
    assert all(torch.equal(found.updates[name], u) for name, u in expected.updates.items())
    assert not any(u.is_inference() for u in found.updates.values())


def test_a_model_made_in_inference_mode_is_one_line():
    with torch.inference_mode():
        model = build_family("llama")
    with pytest.raises(
        ModelError, match=r"^model\.\S+ was made inside torch.inference_mode\(\) .*; load the model outside"
    ):
        ranked(model)


def test_attention_without_a_backward_pass_is_one_line():
    model = build_family("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(
        ModelError, match=r"^flex_attention has no backward pass on a CPU; .*attn_implementation='sdpa'"
    ):
        ranked(model)
    assert ranked(model, method="random").scores  # which needs none


@pytest.mark.parametrize("tokenizer", ["m1", Path("m1"), 3])
def test_a_tokenizer_that_is_not_loaded_is_one_line(tokenizer):
    with pytest.raises(UsageError, match=r"^tokenizer: give the loaded tokenizer of transformers, not a "):
        rank_parameters(family("llama")[0], tokenizer, FORGET_ROWS, RETAIN_ROWS)


def test_scope_may_be_a_list():
    model = family("llama")[0]
    expected = ranked(model, include="mlp,*q_proj*", exclude="*layers.0*")
    for kind in (list, tuple):
        found = ranked(model, include=kind(["mlp", "*q_proj*"]), exclude=kind(["*layers.0*"]))
        assert found.table.equals(expected.table) and found.settings == expected.settings


@pytest.mark.parametrize("scope", [[], ["mlp", 3], {"mlp"}])
def test_a_scope_that_says_nothing_is_one_line(scope):
    with pytest.raises(UsageError, match=r"^--include: .* is not of type str"):
        ranked(family("llama")[0], include=scope)
