"""A run leaves no trace on the model, whether it ends well or not."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fillm.capture import Capture, verify
from fillm.data import SampleSet, collate
from tests.capture import small_models
from tests.capture.reference import toy_samples
from tests.capture.small_models import VOCAB, small_model
from tests.capture.test_gradient_checkpointing import enable
from tests.families import build_family


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a run might disturb; tensors by value and identity."""
    return {
        "flags": [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "values": [t.view(torch.uint8).tolist() if t.ndim else t.item() for t in model.state_dict().values()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forwards": [vars(module).get("forward") for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "tensor hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
    }


def unusual(model: nn.Module) -> nn.Module:
    """Flags and modes that are neither all on nor all off, and gradients that somebody has not thrown away."""
    for index, (module, parameter) in enumerate(zip(model.modules(), model.parameters(), strict=False)):
        module.training = index % 3 == 0
        parameter.requires_grad_(index % 2 == 0)
        if index % 4 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)
    return model


def models() -> dict[str, Callable[[], nn.Module]]:
    def checkpointed() -> nn.Module:
        model = build_family("llama-tied")
        enable(model)
        return model

    return {
        "mixtral": lambda: build_family("mixtral"),
        "checkpointed": checkpointed,
        "with fallback": lambda: small_model(small_models.Einsum()),
    }


@pytest.fixture(params=list(models()))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return unusual(models()[request.param]())


@pytest.fixture
def samples() -> SampleSet:
    return toy_samples(vocab=VOCAB)


def everything(model: nn.Module) -> Capture:
    return Capture(model, [name for name, _ in model.named_parameters()])


def test_after_a_run(model: nn.Module, samples: SampleSet) -> None:
    before = state(model)
    everything(model).run(collate(samples, [0, 1, 2]), samples, lambda name, g, _: g.squared_norms())
    assert state(model) == before


def test_after_a_verification(model: nn.Module, samples: SampleSet) -> None:
    before, capture = state(model), everything(model)
    verify(capture, samples)
    assert state(model) == before
    assert set(capture.fallback) <= {"body.weight"}, "gradients that were there before do not confuse the comparison"


@pytest.mark.parametrize("fail_at", [0, 3, "last"])
def test_after_an_error_while_observing(model: nn.Module, samples: SampleSet, fail_at: int | str) -> None:
    before, capture = state(model), everything(model)
    stop = len(list(model.parameters())) - 1 if fail_at == "last" else fail_at
    count = 0

    def observe(name: str, gradients: object, positions: Tensor) -> None:
        nonlocal count
        if count == stop:
            raise KeyError("enough")
        count += 1

    with pytest.raises(KeyError, match="enough"):
        capture.run(collate(samples, [0, 1, 2]), samples, observe)
    assert state(model) == before


def test_after_an_error_in_the_models_own_forward(samples: SampleSet) -> None:
    model = unusual(build_family("mixtral"))
    before = state(model)
    broken = toy_samples(2, vocab=VOCAB)
    batch = collate(broken, [0, 1])
    batch.input_ids[0, 0] = 10_000
    with pytest.raises(IndexError):
        everything(model).run(batch, broken, lambda *_: None)
    assert state(model) == before


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_forward_that_somebody_put_in_place_stays_in_place(family: str, samples: SampleSet) -> None:
    """accelerate dispatches a model over devices by setting `module.forward` on the instance."""
    model, calls = build_family(family), []
    enable(model)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing") or hasattr(module, "gate_up_proj"):
            inner = module.forward

            def forward(*args: Any, inner: Callable[..., Any] = inner, **kwargs: Any) -> Any:
                calls.append(1)
                return inner(*args, **kwargs)

            module.forward = forward
    before = state(model)
    everything(model).run(collate(samples, [0, 1]), samples, lambda *_: None)
    assert state(model) == before and calls


def test_a_run_inside_no_grad_and_after_one() -> None:
    """The caller's grad mode neither stops a run nor is changed by it."""
    model, samples = build_family("llama"), toy_samples()
    norms: list[dict[str, Tensor]] = [{}, {}]
    with torch.no_grad():
        everything(model).run(
            collate(samples, [0, 1]), samples, lambda n, g, _: norms[0].update({n: g.squared_norms()})
        )
        assert not torch.is_grad_enabled()
    everything(model).run(collate(samples, [0, 1]), samples, lambda n, g, _: norms[1].update({n: g.squared_norms()}))
    assert len(norms[0]) == len(list(model.parameters()))
    assert all(torch.equal(norms[0][name], norms[1][name]) for name in norms[1])


@pytest.mark.parametrize("body", ["CausalConvolution", "CalledTwice", "WeightNorm"])
def test_what_a_small_model_was_run_with_can_be_collected(body: str) -> None:
    assert_collected(lambda: small_model(getattr(small_models, body)()))


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "gemma2", "mixtral"])
def test_a_model_can_be_collected_although_its_gradients_were_kept(kind: str) -> None:
    assert_collected(lambda: build_family(kind))


def assert_collected(build: Callable[[], nn.Module]) -> None:
    """An observer that keeps what it is given does not keep the model.

    A graph that leads from a gradient back to the observer would be a cycle through autograd's nodes, which no
    collector sees: every ranking of a long process would leave its model behind.
    """
    model, samples = build(), toy_samples(vocab=VOCAB)
    gone = weakref.ref(model)
    capture = Capture(model, [name for name, _ in model.named_parameters()])
    verify(capture, samples)
    kept: list[Any] = []
    capture.run(collate(samples, [0, 1]), samples, lambda *given: kept.append(given))
    del model, capture
    gc.collect()
    assert kept and gone() is None
