"""Untouched: what it sees, bit by bit."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fillm import MaskedOptimizer, Untouched, Verification
from fillm.errors import UsageError
from tests.unlearn.standin import NET_KINDS, booleans, entry, llama, net, random_mask

INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def flip(parameter, index, bit=0):
    """Flip one bit of one weight."""
    bits = parameter.detach().view(-1).view(INTS[parameter.dtype])
    bits[index] = bits[index] ^ (1 << bit)


@pytest.mark.parametrize("dtype", INTS, ids=str)
def test_every_flipped_bit_outside_is_found_and_named(dtype):
    model = net(dtype)
    mask = random_mask(model, NET_KINDS)
    chosen, untouched = booleans(model, mask), Untouched.before(model, mask)
    selected = sum(e.count for e in mask.values())
    assert untouched.verify(model) == Verification(True, [], 0, selected, False)
    for name, parameter in model.named_parameters():
        outside = (~chosen[name]).flatten().nonzero()[:, 0].tolist()
        for index in outside[:1] + outside[-1:]:
            flip(parameter, index)
            assert untouched.verify(model) == Verification(False, [name], 0, selected, False)
            flip(parameter, index)
    assert untouched.verify(model).outside_mask_bit_equal


@given(st.integers(0, 4756), st.integers(0, 15))
@settings(max_examples=40, deadline=None)
def test_one_flipped_bit_is_either_outside_or_counted(index, bit):
    model = net(torch.bfloat16)
    mask = random_mask(model, NET_KINDS)
    untouched = Untouched.before(model, mask)
    flip(model[2].weight, index, bit if bit < 15 else 0)
    found = untouched.verify(model)
    inside = bool(mask["2.weight"].chosen.flatten()[index])
    assert found.outside_mask_bit_equal == inside and found.changed_parameters == inside == found.mask_applied
    assert found.differing == ([] if inside else ["2.weight"])


def test_nan_equals_itself_and_minus_zero_is_not_zero():
    model = nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[torch.nan, 0.0, 1.0, 0.0], [torch.nan, 0.0, 1.0, 0.0]])
    untouched = Untouched.before(model, {"weight": entry(torch.tensor([[True] * 4, [False] * 4]), "rows")})
    assert untouched.verify(model) == Verification(True, [], 0, 4, False)
    model.weight.data[0, 1] = -0.0
    assert untouched.verify(model) == Verification(True, [], 1, 4, True)
    model.weight.data[1, 3] = -0.0
    assert untouched.verify(model) == Verification(False, ["weight"], 1, 4, True)


def test_a_decay_leak_and_a_mask_that_was_not_applied():
    for leak in (True, False):
        model = net()
        mask = random_mask(model, NET_KINDS)
        untouched, chosen = Untouched.before(model, mask), booleans(model, mask)
        # Gradients masked by hand, as one might: AdamW's decay moves the rest all the same.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        if not leak:
            optimizer = MaskedOptimizer(optimizer, mask, model)
        for name, p in model.named_parameters():
            p.grad = torch.where(chosen[name], torch.ones_like(p), 0.0)
        optimizer.step()
        found = untouched.verify(model)
        assert found.outside_mask_bit_equal != leak and found.mask_applied
        assert found.changed_parameters == found.selected_parameters == sum(e.count for e in mask.values())
        names = [name for name, p in model.named_parameters() if not chosen[name].all()]
        assert found.differing == (names if leak else [])


def test_the_model_is_left_alone_and_another_copy_may_be_verified():
    model = llama(1, tied=True)
    mask = random_mask(model, {"lm_head.weight": "rows", "model.norm.weight": "whole"})
    before = copy.deepcopy(model.state_dict())
    untouched = Untouched.before(model, mask)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert untouched.verify(copy.deepcopy(model)).outside_mask_bit_equal
    assert untouched.verify(torch.compile(model, backend="eager")).outside_mask_bit_equal
    narrow = untouched.verify(copy.deepcopy(model).bfloat16())
    assert "model.layers.0.mlp.up_proj.weight" in narrow.differing
    assert narrow.changed_parameters == narrow.selected_parameters
    with pytest.raises(UsageError, match="of which the model knows nothing"):
        untouched.verify(net())


def test_an_empty_mask_and_a_whole_model():
    model = net()
    untouched = Untouched.before(model, {})
    assert untouched.verify(model) == Verification(True, [], 0, 0, False)
    whole = {name: entry(torch.ones(p.shape, dtype=torch.bool), "whole") for name, p in model.named_parameters()}
    untouched = Untouched.before(model, whole)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    count = sum(p.numel() for p in model.parameters())
    assert untouched.verify(model) == Verification(True, [], count, count, True)
