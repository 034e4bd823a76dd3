"""State of the selected weights alone: its bytes, its way through state_dict, float32 copies of narrow weights."""

import copy

import pytest
import torch
from torch import nn

from fillm import MaskedOptimizer
from fillm.errors import UsageError
from tests.unlearn.dense import ELEMENTWISE, assert_near, backward
from tests.unlearn.standin import NET_KINDS, entry, net, random_mask


@pytest.mark.parametrize("kind", ["AdamW", "AdamW amsgrad", "SGD", "Adagrad", "Sophia"])
def test_state_is_of_the_selected_weights_alone(kind):
    model = net()
    mask = random_mask(model, NET_KINDS)
    optimizer = MaskedOptimizer(ELEMENTWISE[kind](list(model.parameters())), mask, model)
    backward(model, 0)
    optimizer.step()
    tensors = {"AdamW": 2, "AdamW amsgrad": 3, "SGD": 1, "Adagrad": 1, "Sophia": 2}[kind]
    steps = 0 if kind == "SGD" else 4 * len(mask)
    assert optimizer.state_bytes == 4 * tensors * sum(e.count for e in mask.values()) + steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop", "Sophia"])
def test_a_loaded_state_goes_on_to_the_same_bits(kind, master, dtype):
    model = net(dtype)
    mask = random_mask(model, NET_KINDS)

    def wrapped(of):
        return MaskedOptimizer(ELEMENTWISE[kind](list(of.parameters())), mask, of, master_weights=master)

    optimizer, resumed = wrapped(model), None
    for step in range(6):
        if step == 3:
            copied = net(dtype)
            copied.load_state_dict(model.state_dict())
            resumed = wrapped(copied)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            resumed.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.02
        for each, of in ((optimizer, model), (resumed, resumed and copied)):
            if each is not None:
                backward(of, step)
                each.step()
                each.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert resumed.state_bytes == optimizer.state_bytes
    if master and dtype == torch.bfloat16:
        with pytest.raises(UsageError, match="another master_weights"):
            MaskedOptimizer(ELEMENTWISE[kind](list(model.parameters())), mask, model).load_state_dict(
                optimizer.state_dict()
            )


def test_the_state_of_another_mask_is_refused():
    model = net()
    chosen = torch.zeros(71, 67, dtype=torch.bool)
    chosen[3] = True
    states = []
    for mask in (chosen, chosen.roll(1, 0)):  # as many weights
        optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters()), {"2.weight": entry(mask, "rows")}, model)
        states.append(optimizer.state_dict())
    optimizer.load_state_dict(states[1])
    for other in (states[0], torch.optim.AdamW(model.parameters()).state_dict()):
        with pytest.raises(UsageError, match="another mask, or with none"):
            optimizer.load_state_dict(other)


def test_state_from_before_the_mask_is_kept_for_what_is_selected():
    model, twin = net(), net()
    mask = random_mask(model, {name: "bits" for name, _ in model.named_parameters()}, share=1.1)
    inner, peer = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin))
    for step in range(3):
        for m, each in ((model, inner), (twin, peer)):
            backward(m, step)
            each.step()
            each.zero_grad()
    optimizer = MaskedOptimizer(inner, mask, model)
    for m, each in ((model, optimizer), (twin, peer)):
        backward(m, 7)
        each.step()
    assert_near(model, twin, None, 4)


@pytest.mark.parametrize("kind", ["AdamW", "Adagrad"])
def test_a_scalar_parameter_brings_its_state_along(kind):
    scalars = [nn.ParameterDict({"scale": torch.tensor(0.5)}) for _ in range(2)]
    inner, peer = (ELEMENTWISE[kind](list(one.values())) for one in scalars)
    for step in range(4):
        if step == 2:
            inner = MaskedOptimizer(inner, {"scale": entry(torch.tensor(True))}, scalars[0])
        for one, each in zip(scalars, (inner, peer), strict=True):
            one["scale"].grad = torch.tensor(1.0 + step)
            each.step()
    torch.testing.assert_close(scalars[0]["scale"], scalars[1]["scale"], rtol=1e-6, atol=0)


def test_master_weights_keep_steps_below_half_an_ulp():
    for master, moved in ((False, False), (True, True)):
        model = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            model.weight.fill_(1.0)
        chosen = torch.zeros(8, 8, dtype=torch.bool)
        chosen[2:4] = True
        mask = {"weight": entry(chosen, "rows")}
        inner = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        optimizer = MaskedOptimizer(inner, mask, model, master_weights=master)
        for _ in range(100):  # 100 steps of 1e-4 are 0.01; a bfloat16 below 1 is 1/256 from its neighbour
            model.weight.grad = torch.ones(8, 8, dtype=torch.bfloat16)
            optimizer.step()
        assert bool((model.weight[chosen] == torch.tensor(0.99).bfloat16()).all()) == moved
        assert bool((model.weight[~chosen] == 1).all())
        assert optimizer.state_bytes == (3 if master else 2) * 16 * 4 + 4


@pytest.mark.filterwarnings("ignore")  # of a package that this project does not pin
def test_torchao_8_bit_state():
    make = pytest.importorskip("torchao.optim").AdamW8bit
    model = nn.Linear(256, 64, bias=False)
    start, mask = (
        model.weight.detach().clone(),
        {"weight": entry((torch.arange(64) % 2 == 0)[:, None].expand(64, 256), "rows")},
    )
    optimizer = MaskedOptimizer(make(model.parameters(), lr=0.01, weight_decay=0.1), mask, model)
    for _ in range(3):
        model(torch.randn(8, 256)).square().mean().backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(model.weight[1::2], start[1::2]) and bool((model.weight[::2] != start[::2]).all())
    assert optimizer.state_bytes < 2.5 * mask["weight"].count  # of 8 in float32
