"""Fifty steps with decay, clipping and momentum, in a plain loop: nothing outside the mask moves."""

import copy

import pytest
import torch

from fillm import MaskedOptimizer, Sophia, Untouched, frozen_outside
from tests.unlearn.standin import booleans, entry, llama, random_mask

MAKE = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1),
    "Sophia": lambda p: Sophia(p, lr=0.01, weight_decay=0.1),
}


def granular(model, granularity):
    """Something of most tensors, the embedding and a norm among them."""
    if granularity == "head":  # the first of two heads of every query projection: 8 of 16 rows
        chosen = (torch.arange(16) < 8)[:, None].expand(16, 16)
        return {f"model.layers.{n}.self_attn.q_proj.weight": entry(chosen, "rows") for n in range(4)}
    kind = {"tensor": "whole", "row": "rows", "element": "bits"}[granularity]
    names = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 3)),
    ]
    return random_mask(model, {name: kind for name in names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row", "head", "element"])
@pytest.mark.parametrize("kind", MAKE)
def test_what_is_outside_keeps_its_bits(kind, granularity, dtype):
    model = llama().to(dtype)
    mask = granular(model, granularity)
    start, untouched = copy.deepcopy(model.state_dict()), Untouched.before(model, mask)
    optimizer = MaskedOptimizer(MAKE[kind](model.parameters()), mask, model)
    ids = torch.arange(24).view(3, 8)
    # Frozen or not, the optimiser alone keeps to the mask.
    with frozen_outside(model, mask) if dtype == torch.float32 else torch.enable_grad():
        for _ in range(50):
            if optimizer.due:
                optimizer.estimate(lambda: model(input_ids=ids).logits[:, :-1].flatten(0, 1))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()
    found = untouched.verify(model)
    assert found.outside_mask_bit_equal and found.mask_applied and not found.differing
    for name, chosen in booleans(model, mask).items():
        assert torch.equal(model.get_parameter(name).detach()[~chosen], start[name][~chosen]), name
    # Tokens that never appear have no gradient, and a bfloat16 decay step is below half an ulp.
    assert found.changed_parameters > 0.6 * found.selected_parameters
