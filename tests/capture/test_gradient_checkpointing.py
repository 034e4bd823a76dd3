"""Activations recomputed in the backward pass: the same numbers, and really recomputed."""

import pytest
import torch
from torch import Tensor, nn

from fillm.capture import Capture, PerSampleGradients
from fillm.data import collate
from tests.capture.reference import toy_samples
from tests.families import build_family, build_lora

SAMPLES = toy_samples()
BLOCK_INPUT = {
    "llama-tied": "model.layers.0.mlp",
    "gpt2": "transformer.h.0.mlp",
    "mixtral": "model.layers.0.mlp",
    "opt": "model.decoder.layers.0.fc1",
}


def enable(model: nn.Module) -> None:
    """By whichever name this transformers has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def capture_once(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Norms and first sample's gradient of every tensor, each of which must come by once."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        assert name not in seen, f"{name} came by twice"
        seen[name] = (gradients.squared_norms(), gradients.materialise(0).clone())

    capture = Capture(model, [name for name, _ in model.named_parameters()])
    capture.run(collate(SAMPLES, [2, 0, 5]), SAMPLES, observe)
    assert capture.fallback == {}
    return seen


@pytest.mark.parametrize("family", list(BLOCK_INPUT))
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    model, calls = build_family(family), []
    model.get_submodule(BLOCK_INPUT[family]).register_forward_pre_hook(lambda *_: calls.append(family))
    plain = capture_once(model)
    assert len(calls) == 1
    enable(model)
    calls.clear()
    checkpointed = capture_once(model)
    assert len(calls) == 2, "once in the forward pass, once more in the backward pass"
    assert set(checkpointed) == set(plain)
    for name, (norms, gradient) in plain.items():
        assert torch.equal(checkpointed[name][0], norms) and torch.equal(checkpointed[name][1], gradient), name


def test_adapters_on_a_checkpointed_model() -> None:
    model = build_lora("llama", ["q_proj", "down_proj"])
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    norms: list[dict[str, Tensor]] = []
    for _ in range(2):
        norms.append({})
        capture = Capture(model, names)
        capture.run(collate(SAMPLES, [0, 1]), SAMPLES, lambda name, g, _: norms[-1].update({name: g.squared_norms()}))
        enable(model.get_base_model())
    assert set(norms[0]) == set(names)
    assert all(torch.equal(norms[0][name], norms[1][name]) for name in names)
