"""A capture of some tensors: the same numbers as of all, and no work below the lowest of them."""

import pytest
import torch
from torch import Tensor, nn

from fillm.capture import Capture
from fillm.data import collate
from tests.capture.reference import toy_samples
from tests.families import build_family

SAMPLES = toy_samples()


def answers(model: nn.Module, names: list[str], layout: str = "right") -> dict[str, tuple[Tensor, Tensor]]:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    capture = Capture(model, names)
    capture.run(
        collate(SAMPLES, [4, 1, 3], layout),
        SAMPLES,
        lambda name, g, _: seen.update({name: (g.squared_norms(), g.materialise(1).clone())}),
    )
    assert capture.fallback == {}
    return seen


@pytest.mark.parametrize("layout", ["right", "packed"])
@pytest.mark.parametrize(
    ("family", "chosen"),
    [
        ("llama", ("layers.1.input_layernorm", "layers.1.post_attention_layernorm")),
        ("llama", ("lm_head",)),
        ("gemma2", ("layers.1.pre_feedforward_layernorm", "q_proj")),
        ("gpt2", ("h.0.mlp.c_fc", "wpe", "h.1.ln_1")),
        ("gpt2", ("h.1.mlp.c_proj",)),
        ("mixtral", ("layers.1.mlp.experts.down_proj", "layers.0.mlp.gate")),
        ("qwen3", ("k_norm",)),
        ("phi", ("lm_head.bias", "k_proj.bias")),
    ],
)
def test_some_tensors_as_among_all(family: str, chosen: tuple[str, ...], layout: str) -> None:
    model = build_family(family)
    every = answers(model, [name for name, _ in model.named_parameters()], layout)
    names = [name for name in every if any(part in name for part in chosen)]
    some = answers(model, names, layout)
    assert sorted(some) == sorted(names) and names
    for name in names:
        for one, other in zip(some[name], every[name], strict=True):
            # A norm whose parameters are out of scope runs as one operation, not as three.
            assert float((one - other).norm()) <= 1e-5 * float(other.norm()), name


@pytest.mark.parametrize(
    ("scope", "first"),
    [("model.layers.1.input_layernorm.weight", 1), ("lm_head.weight", 2), ("model.layers.0.mlp.up_proj.weight", 0)],
)
def test_backward_stops_at_the_lowest_tensor_in_scope(scope: str, first: int) -> None:
    """Layers below have outputs without a graph; layers above have one."""
    model, graphs = build_family("llama"), {}
    layers = dict(enumerate(model.model.layers)) | {-1: model.model.embed_tokens}
    handles = [
        layer.register_forward_hook(lambda _, __, out, index=index: graphs.update({index: out.requires_grad}))
        for index, layer in layers.items()
    ]
    seen = answers(model, [scope])
    for handle in handles:
        handle.remove()
    assert set(seen) == {scope}
    assert graphs == {index: index >= first for index in (-1, 0, 1)}


def test_nothing_in_scope_that_the_loss_depends_on() -> None:
    model = build_family("llama")
    model.extra = nn.Parameter(torch.ones(3))
    assert answers(model, ["extra"]) == {}
