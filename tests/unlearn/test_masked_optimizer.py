"""MaskedOptimizer beside dense optimisers that are masked by hand."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from fillm import MaskedOptimizer, Untouched, frozen_outside
from fillm.errors import UsageError
from tests.kernels.contract import Recorder
from tests.unlearn.dense import ELEMENTWISE, assert_near, backward
from tests.unlearn.standin import NET_KINDS, booleans, entry, llama, net, random_mask


def masked_by_hand(model, make, chosen, steps, max_norm=math.inf):
    """A dense optimiser whose gradients are masked before and whose updates are masked after every step."""
    optimizer = make(list(model.parameters()))
    for step in range(steps):
        backward(model, step)
        before = {}
        for name, p in model.named_parameters():
            p.grad = torch.where(chosen[name], p.grad, 0.0)
            before[name] = p.detach().clone()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.where(chosen[name], p, before[name]))
        optimizer.zero_grad()
    return norm


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_a_masked_step_is_the_dense_one_masked_by_hand(kind):
    make, steps = ELEMENTWISE[kind], 6
    masked, dense = net(), net()
    mask = random_mask(masked, NET_KINDS)
    chosen, start = booleans(masked, mask), copy.deepcopy(masked.state_dict())
    optimizer = MaskedOptimizer(make(list(masked.parameters())), mask, masked)
    for step in range(steps):
        backward(masked, step)
        norm = optimizer.clip_grad_norm_(0.05)
        optimizer.step()
        optimizer.zero_grad()
    want = masked_by_hand(dense, make, chosen, steps, 0.05)
    torch.testing.assert_close(norm.float(), want)
    assert_near(masked, dense, chosen, steps)
    for name, p in masked.named_parameters():
        assert torch.equal(p.detach()[~chosen[name]], start[name][~chosen[name]]), name
        assert name not in mask or not torch.equal(p.detach(), start[name]), name


@pytest.mark.parametrize("kind", ["AdamW", "Sophia"])
def test_a_mask_of_all_ones_is_the_dense_optimiser(kind):
    masked, dense = net(), net()
    mask = {name: entry(torch.ones(p.shape, dtype=torch.bool), "bits") for name, p in masked.named_parameters()}
    optimizer = MaskedOptimizer(ELEMENTWISE[kind](list(masked.parameters())), mask, masked)
    peer = ELEMENTWISE[kind](list(dense.parameters()))
    for step in range(20):
        for model, each in ((masked, optimizer), (dense, peer)):
            backward(model, step)
            each.step()
            each.zero_grad()
    assert_near(masked, dense, booleans(masked, mask), 20)


def test_groups_keep_their_own_hyperparameters_and_schedulers_work_on_either():
    for of_wrapper in (True, False):
        masked, dense = net(), net()
        mask = random_mask(masked, NET_KINDS)

        def groups(model):
            matrices = [p for p in model.parameters() if p.ndim > 1]
            vectors = [p for p in model.parameters() if p.ndim == 1]
            return [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "lr": 0.05, "weight_decay": 0.0}]

        inner = torch.optim.AdamW(groups(masked), lr=0.01)
        early = None if of_wrapper else LambdaLR(inner, lambda t: 0.5**t)
        optimizer = MaskedOptimizer(inner, mask, masked)
        scheduler = early or LambdaLR(optimizer, lambda t: 0.5**t)
        chosen = booleans(masked, mask)
        peer = torch.optim.AdamW(groups(dense), lr=0.01)
        peer_scheduler = LambdaLR(peer, lambda t: 0.5**t)
        for step in range(4):
            backward(masked, step)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            backward(dense, step)
            before = [p.detach().clone() for p in dense.parameters()]
            peer.step()
            peer_scheduler.step()
            peer.zero_grad()
            with torch.no_grad():
                for (name, p), b in zip(dense.named_parameters(), before, strict=True):
                    p.copy_(torch.where(chosen[name], p, b))
        assert_near(masked, dense, chosen, 4)
        assert optimizer.param_groups[1]["lr"] == 0.05 * 0.5**4


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Sophia"])
def test_what_stands_outside_the_mask_counts_for_nothing(kind):
    first, second = net(), net()
    mask = random_mask(first, NET_KINDS)
    chosen, norms = booleans(first, mask), []
    for model in (first, second):
        optimizer = MaskedOptimizer(ELEMENTWISE[kind](list(model.parameters())), mask, model)
        backward(model, 0)
        if model is second:
            for name, p in model.named_parameters():
                p.grad[~chosen[name]] = torch.nan
        norms.append(optimizer.clip_grad_norm_(0.01))
        optimizer.step()
    assert norms[0] == norms[1] and norms[0] > 0
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clips_add_up_until_the_step_and_leave_gradients_alone():
    model = nn.Linear(2, 1, bias=False)
    mask = {"weight": entry(torch.tensor([[True, False]]))}
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), mask, model)
    start = model.weight.detach().clone()
    assert optimizer.clip_grad_norm_(1.0) == 0  # no gradient yet
    model.weight.grad = torch.tensor([[4.0, 9.0]])
    assert optimizer.clip_grad_norm_(2.0) == 4
    assert optimizer.clip_grad_norm_(math.inf).item() == pytest.approx(2, rel=1e-5)
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(2, rel=1e-5)
    assert model.weight.grad.tolist() == [[4.0, 9.0]]
    optimizer.step()
    assert (start - model.weight).tolist() == [[pytest.approx(1.0, rel=1e-5), 0.0]]
    optimizer.step()  # the clip was of the last one
    assert (start - model.weight).tolist() == [[pytest.approx(5.0, rel=1e-5), 0.0]]
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    model.weight.grad = torch.tensor([[4.0, 9.0]])
    optimizer.step()
    assert (start - model.weight).tolist() == [[pytest.approx(9.0, rel=1e-5), 0.0]]


def test_names_come_from_named_groups_or_the_model():
    model = net()
    mask = random_mask(model, {"2.weight": "bits"})
    MaskedOptimizer(torch.optim.AdamW(list(model.named_parameters())), mask)
    with pytest.raises(UsageError, match="give model="):
        MaskedOptimizer(torch.optim.AdamW(model.parameters()), mask)
    prefixed = {"module._orig_mod.2.weight": mask["2.weight"]}
    MaskedOptimizer(torch.optim.AdamW(list(model.named_parameters())), prefixed)
    compiled = torch.compile(model, backend="eager")
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    MaskedOptimizer(torch.optim.AdamW(compiled.parameters()), mask, compiled)
    held = torch.optim.AdamW([model[0].weight])
    for named, message in (
        ({"2.wait": mask["2.weight"]}, "2.wait, of which the optimiser knows nothing"),
        ({"0.weight": mask["2.weight"]}, r"0.weight: the mask is one of shape \[71, 67\].*\[67, 13\]"),
    ):
        with pytest.raises(UsageError, match=message):
            MaskedOptimizer(torch.optim.AdamW(model.parameters()), named, model)
    with pytest.raises(UsageError, match="2.weight, of which the optimiser knows nothing"):
        MaskedOptimizer(held, mask, model)


def test_a_tied_tensor_goes_by_any_of_its_names_but_once():
    model = llama(1, tied=True)
    table = "model.embed_tokens.weight"
    mask = random_mask(model, {table: "rows"})
    for name in (table, "lm_head.weight"):
        optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters()), {name: mask[table]}, model)
        before = model.lm_head.weight.detach().clone()
        model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
        optimizer.step()
        moved = (model.lm_head.weight != before).any(1)
        assert moved.any() and not moved[~mask[table].chosen[:, 0]].any()
    with pytest.raises(UsageError, match="one tied tensor"):
        MaskedOptimizer(
            torch.optim.AdamW(model.parameters()), {n: mask[table] for n in (table, "lm_head.weight")}, model
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda p: transformers.Adafactor(p),
        lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
        lambda p: torch.optim.LBFGS(p),
        lambda p: type("MyLAMB", (torch.optim.SGD,), {})(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, differentiable=True),
    ],
)
def test_what_cannot_step_a_part_of_a_tensor_is_refused_by_name(make):
    model = net()
    with pytest.raises(UsageError, match="Adafactor|Muon|LBFGS|LAMB|differentiable"):
        MaskedOptimizer(make(list(model.parameters())), random_mask(model, {"2.weight": "bits"}), model)


def test_other_tensors_that_cannot_be_stepped_in_place_are_refused():
    model = net()
    mask = random_mask(model, {"2.weight": "bits"})
    wrapped = MaskedOptimizer(torch.optim.AdamW(model.parameters()), mask, model)
    with pytest.raises(UsageError, match="has a mask already"):
        MaskedOptimizer(wrapped, mask, model)
    with pytest.raises(UsageError, match="takes no curvature estimate"):
        wrapped.estimate(lambda: torch.zeros(1, 2))
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    with pytest.raises(UsageError, match="not contiguous"):
        MaskedOptimizer(torch.optim.AdamW(model.parameters()), mask, model)


def test_parameters_that_are_no_whole_floating_point_tensors_are_refused():
    model = net()
    mask = random_mask(model, {"2.weight": "bits"})
    model[2].weight = nn.Parameter(torch.zeros_like(model[2].weight, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match="^2.weight is int8, and a mask needs floating-point weights; load .*$"):
        frozen_outside(model, mask)
    model = net()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for refused in (
            lambda: MaskedOptimizer(torch.optim.AdamW(model.parameters()), mask, model),
            lambda: frozen_outside(model, mask),
            lambda: Untouched.before(model, mask),
        ):
            with pytest.raises(UsageError, match=r"^2.weight is sharded \(FSDP2\), and a mask needs whole .*$"):
                refused()
    finally:
        dist.destroy_process_group()


def test_a_masked_state_in_an_optimiser_without_a_mask_is_refused():
    model, twin = net(), net()
    mask = random_mask(model, {"2.weight": "bits", "2.bias": "whole"})
    masked = MaskedOptimizer(torch.optim.AdamW([model[2].weight, model[2].bias]), mask, model)
    backward(model, 0)
    masked.step()
    plain = torch.optim.AdamW([twin[2].weight, twin[2].bias])
    plain.load_state_dict(masked.state_dict())
    held = {parameter: dict(state) for parameter, state in plain.state.items()}
    with pytest.raises(UsageError, match="^2.weight: the state of a masked optimiser was loaded"):
        MaskedOptimizer(plain, mask, twin)
    assert {parameter: dict(state) for parameter, state in plain.state.items()} == held


def test_a_closure_is_evaluated_with_gradient_and_its_loss_returned():
    for kind in ("AdamW", "SGD", "Sophia"):
        model = net()
        optimizer = MaskedOptimizer(ELEMENTWISE[kind](list(model.parameters())), random_mask(model, NET_KINDS), model)

        def closure(model=model):
            loss = (model(torch.ones(1, 13)) - 3).square().sum()
            loss.backward()
            return loss

        before = (model(torch.ones(1, 13)) - 3).square().sum()
        assert torch.equal(optimizer.step(closure), before)
        assert (model(torch.ones(1, 13)) - 3).square().sum() < before


def test_parameters_without_gradient_and_an_empty_mask_are_left_alone():
    model = net()
    start = copy.deepcopy(model.state_dict())
    empty = MaskedOptimizer(torch.optim.AdamW(model.parameters()), {}, model)
    backward(model, 0)
    assert empty.clip_grad_norm_(1.0) == 0
    empty.step()
    model.zero_grad()
    for kind in ("AdamW", "SGD"):
        optimizer = MaskedOptimizer(ELEMENTWISE[kind](list(model.parameters())), random_mask(model, NET_KINDS), model)
        optimizer.step()
        assert optimizer.state_bytes == 0
    assert all(torch.equal(start[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("kind", ["AdamW", "Sophia"])
def test_parameters_of_a_group_step_in_one_call_and_those_that_missed_a_step_count_their_own(kind):
    masked, dense = net(), net()
    mask = {name: entry(torch.ones(p.shape, dtype=torch.bool), "bits") for name, p in masked.named_parameters()}
    optimizer = MaskedOptimizer(ELEMENTWISE[kind](list(masked.parameters())), mask, masked)
    peer = ELEMENTWISE[kind](list(dense.parameters()))
    for step in range(4):
        for model, each in ((masked, optimizer), (dense, peer)):
            backward(model, step)
            if step == 1:
                model[2].weight.grad = model[2].bias.grad = None
            with Recorder() as recorder:
                each.step()
            each.zero_grad()
            if each is optimizer:
                assert len(recorder.calls) == (1 if step < 2 else 2)
    assert_near(masked, dense, booleans(masked, mask), 4)
    taken = [int(optimizer.state[part]["step"]) for part in optimizer.state]
    assert sorted(taken) == [3, 3, 4, 4, 4, 4]


def test_grad_scaler_and_a_plain_loop():
    model = net()
    mask = random_mask(model, NET_KINDS)
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), mask, model)
    chosen, start = booleans(model, mask), copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    losses = []
    for _ in range(50):
        loss = F.mse_loss(model(torch.ones(3, 13)), torch.ones(3, 5))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p.detach()[~chosen[name]], start[name][~chosen[name]])
