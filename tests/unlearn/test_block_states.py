"""The output of one block at the answer's own tokens, and no work above it."""

import pytest
import torch
from torch import nn

from fillm.data import collate
from fillm.errors import ModelError
from fillm.unlearn.block_states import answer_states, decoder_blocks
from tests.families import build_family, build_lora
from tests.unlearn.table_model import sample_set

SAMPLES = sample_set(([5, 9, 2, 31, 7], 2), ([1, 10], 1), ([3, 3, 15, 8, 60, 6, 11], 3))
ANSWERS = [[2, 3, 4], [1], [3, 4, 5, 6]]  # positions of the answers' own tokens


def block_output(model, layer):
    """By transformers' own list of hidden states, whose last entry has gone through the final norm."""
    rows = []
    for sample, positions in zip(SAMPLES, ANSWERS, strict=True):
        states = model(input_ids=torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states
        rows.append(states[layer + 1][0, positions])
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "right") for family in ("llama", "gpt2", "gpt-neox", "opt", "mixtral", "gemma2")),
        ("opt", "left"),
        ("llama", "left"),
        ("llama", "packed"),
    ],
)
def test_states_are_those_of_the_block(family, layout):
    model = build_family(family)
    assert len(decoder_blocks(model)) == 2
    found = answer_states(model, collate(SAMPLES, range(3), layout), 0)
    torch.testing.assert_close(found, block_output(model, 0), rtol=1e-5, atol=1e-5)


def test_the_last_block_ends_before_the_head():
    model = build_family("llama")
    states = answer_states(model, collate(SAMPLES, range(3)), 1)
    torch.testing.assert_close(model.model.norm(states), block_output(model, 1), rtol=1e-5, atol=1e-5)


def test_an_adapter_is_looked_through():
    model = build_lora("llama", ["q_proj", "down_proj"])
    found = answer_states(model, collate(SAMPLES, range(3)), 0)
    torch.testing.assert_close(found, block_output(model, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_nothing_runs_above_the_block(layer):
    model, ran = build_family("llama"), []
    for name in ("model.layers.0", "model.layers.1", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    answer_states(model, collate(SAMPLES, range(3)), layer)
    assert ran == ["model.layers.0", "model.layers.1"][: layer + 1]
    ran.clear()
    model(input_ids=torch.tensor([[1, 2]]))  # no hook is left behind
    assert ran == ["model.layers.0", "model.layers.1", "lm_head"]


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_under_gradient_checkpointing(layer):
    def gradient(checkpointing):
        model = build_family("llama").train()
        weight = model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
        if checkpointing:
            name = "activation_checkpointing_enable"  # as newer versions of transformers call it
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
        answer_states(model, collate(SAMPLES, range(3)), layer).square().sum().backward()
        return weight.grad

    plain = gradient(checkpointing=False)
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient(checkpointing=True), plain, rtol=1e-5, atol=1e-6)


def test_an_error_in_the_model_is_its_own():
    model = build_family("llama")
    model.model.layers[0].mlp.forward = None
    with pytest.raises(TypeError):
        answer_states(model, collate(SAMPLES, range(3)), 0)


def test_a_model_without_blocks():
    with pytest.raises(ModelError, match="Linear has no list of blocks"):
        decoder_blocks(nn.Linear(2, 2))
