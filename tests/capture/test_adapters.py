"""LoRA factors, alone and next to the weights they adapt."""

import pytest
from torch import nn

from fillm.capture import Capture, verify
from tests.capture.reference import ask, assert_exact, directions, reference_gradients, toy_samples
from tests.families import build_lora

SAMPLES = toy_samples(5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_fc"]),
        ("llama", ["embed_tokens", "up_proj"]),
    ],
)
def test_factors_equal_float64_autograd(family: str, targets: list[str]) -> None:
    model = build_lora(family, targets)
    factors = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(factors) >= 4
    references, v = reference_gradients(model, SAMPLES), directions(model)
    for names in (factors, [name for name, _ in model.named_parameters()]):
        capture = Capture(model, names)
        verify(capture, SAMPLES)
        answers = ask(capture, SAMPLES, [[2, 0], [4, 1, 3]], "right", v)
        assert_exact(_only(model, names), references, answers, v, tolerance=2e-5)
        # Adapters of an embedding go through a transposed table, for which there is no rule.
        assert all("lora_embedding" in name for name in capture.fallback)


def _only(model: nn.Module, names: list[str]) -> nn.Module:
    """A stand-in that has the named parameters alone."""
    stand_in = nn.Module()
    stand_in.named_parameters = lambda: ((name, p) for name, p in model.named_parameters() if name in names)
    return stand_in
