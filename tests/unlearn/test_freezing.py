"""frozen_outside: which gradients are formed, which layers backward enters, and what it says it saves."""

import pytest
import torch

from fillm import frozen_outside
from fillm.errors import UsageError
from tests.unlearn.standin import llama, random_mask

# transformers renamed gradient_checkpointing_enable; the older name works in all versions.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
TOP = {"model.layers.3.mlp.down_proj.weight": "rows", "model.layers.2.self_attn.q_proj.weight": "bits"}


def entered(model):
    """Layers whose backward ran in a training step, by hooks on their outputs' gradients."""
    seen, hooks = set(), []
    for index, layer in enumerate(model.model.layers):

        def forward(module, arguments, output, index=index):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: seen.add(index))

        hooks.append(layer.register_forward_hook(forward))
    ids = torch.arange(12).view(2, 6)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_stops_at_the_lowest_selected_layer(checkpointing):
    model = llama()
    mask = random_mask(model, TOP)
    assert entered(model) == {0, 1, 2, 3}
    model.zero_grad()
    reference = llama()
    entered(reference)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    frozen = frozen_outside(model, mask)
    assert entered(model) == {2, 3}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == set(TOP)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, reference.get_parameter(name).grad)
    assert frozen.savings["lowest_layer"] == frozen.savings["layers_without_backward"] == 2
    frozen.restore()
    assert entered(model) == {0, 1, 2, 3}
    assert bool(model.model.embed_tokens._forward_hooks) == checkpointing  # transformers' own, back again


def test_the_savings_are_those_counted_by_hand():
    model = llama().bfloat16()
    mask = random_mask(model, TOP)
    savings = frozen_outside(model, mask).savings
    weights = 2 * 37 * 16 + 16 + 4 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16)
    formed, selected = 16 * 24 + 16 * 16, sum(e.count for e in mask.values())
    assert savings == {
        "tensors": 3 + 4 * 9,
        "tensors_trained": 2,
        "layers": 4,
        "layers_without_backward": 2,
        "lowest_layer": 2,
        "weight_gradient_bytes": 2 * formed,
        "weight_gradient_bytes_saved": 2 * (weights - formed),
        "state_bytes": 8 * selected,
        "state_bytes_saved": 8 * (weights - selected),
    }


@pytest.mark.parametrize(
    ("names", "lowest", "without"),
    [
        (["lm_head.weight"], None, 4),
        (["model.norm.weight"], None, 4),
        (["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"], -1, 0),
        (["model.layers.0.mlp.up_proj.weight"], 0, 0),
        ([], None, 4),
    ],
)
def test_where_the_lowest_tensor_lies(names, lowest, without):
    model = llama()
    frozen = frozen_outside(model, random_mask(model, {name: "rows" for name in names}))
    assert frozen.savings["lowest_layer"] == lowest and frozen.savings["layers_without_backward"] == without
    if names:
        assert entered(model) == (set() if lowest is None else set(range(max(lowest, 0), 4)))


def test_a_tied_head_is_the_embedding():
    model = llama(tied=True)
    frozen = frozen_outside(model, random_mask(model, {"lm_head.weight": "rows"}))
    assert frozen.savings["lowest_layer"] == -1
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


def test_as_a_context_it_gives_back_what_it_found():
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with frozen_outside(model, random_mask(model, TOP)) as frozen:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(TOP)
        assert frozen.savings["tensors_trained"] == 2
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_reentrant_checkpointing_is_refused_and_nothing_was_frozen():
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UsageError, match="reentrant"):
        frozen_outside(model, random_mask(model, TOP))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError, match="of which the model knows nothing"):
        frozen_outside(llama(1), random_mask(model, TOP))
