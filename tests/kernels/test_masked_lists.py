"""masked_adamw_, masked_sophia_ and masked_norm on lists: one call is one after the other, and torch knows of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fillm_kernels import (
    DeviceError,
    DtypeError,
    ShapeError,
    masked_adamw_,
    masked_norm,
    masked_sophia_,
    select_bits,
    select_rows,
)
from fillm_kernels.top_mask import pack_bits
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from tests.kernels.contract import Recorder, assert_same_bits, changed, copy, flat

ADAMW = {"step": 3, "lr": 0.01, "weight_decay": 0.1, "clip": 0.7}
SOPHIA = {"lr": 0.01, "gamma": 0.05, "weight_decay": 0.1, "clip": 0.7}
NAMES = ("param", "grad", "state", "mask")


def tensors() -> dict[str, list[Any]]:
    """Parameters of several types and shapes in mid-training, an empty one and one without a selected weight too."""
    made: dict[str, list[Any]] = {name: [] for name in (*NAMES, "estimate")}
    for shape, dtype, share in (
        ((7, 9), torch.float32, 0.5),
        ((13, 5), torch.bfloat16, 1.0),
        ((3, 2049), torch.float32, 0.1),
        ((0, 4), torch.float32, 0.5),
        ((5, 3), torch.float64, 0.0),
    ):
        rows = (torch.rand(shape[0]) < share).nonzero()[:, 0]
        bits = pack_bits(torch.rand(shape) < share)
        numbers = torch.randn(3, *shape, dtype=torch.float64).to(dtype)
        entries = shape[0] * shape[1]
        selection = select_rows(rows, shape) if len(made["mask"]) % 2 else select_bits(bits, entries)
        first, second = selection.new_state(numbers[0])
        made["param"].append(numbers[0].clone())
        made["grad"].append(numbers[1].clone())
        made["estimate"].append(numbers[2].square())
        made["state"].append((first.normal_(), second.uniform_(0.5, 2)))
        made["mask"].append(selection)
    return made


def adamw(given: dict[str, Any]) -> Any:
    return masked_adamw_(*(given[name] for name in NAMES), **ADAMW)


def plain_sophia(given: dict[str, Any]) -> Any:
    return masked_sophia_(*(given[name] for name in NAMES), **SOPHIA)


def sophia(given: dict[str, Any]) -> Any:
    return masked_sophia_(*(given[name] for name in NAMES), estimate=given["estimate"], **SOPHIA)


every_step = pytest.mark.parametrize("step", [adamw, plain_sophia, sophia])


@every_step
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton", "reference"])
def test_a_list_is_stepped_as_one_after_the_other_to_the_bit(step, backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    together = tensors()
    before, apart = copy(together), copy(together)
    step(together)
    for t in range(len(apart["param"])):
        step({name: values[t] for name, values in apart.items()})
    assert_same_bits(flat(list(together.values())), flat(list(apart.values())))
    assert_same_bits(together["grad"] + together["estimate"], before["grad"] + before["estimate"])
    moved = [not torch.equal(a, b) for a, b in zip(together["param"], before["param"], strict=True)]
    assert moved == [True, True, True, False, False]


@every_step
def test_what_is_returned_is_the_parameters_themselves(step):
    given = tensors()
    given["param"] = tuple(torch.nn.Parameter(param) for param in given["param"])
    results = step(given)
    assert all(result is param for result, param in zip(results, given["param"], strict=True))


def test_a_norm_of_a_list_enters_torch_once_and_adds_in_order():
    given = tensors()
    with Recorder() as recorder:
        norm = masked_norm(given["grad"], given["mask"])
    assert [op.name() for op, _ in recorder.calls] == ["fillm_kernels::masked_squares"]
    squares = [masked_norm(grad, mask).square() for grad, mask in zip(given["grad"], given["mask"], strict=True)]
    torch.testing.assert_close(norm, sum(squares).sqrt(), rtol=1e-14, atol=0)


@every_step
def test_versions_count_what_is_written_and_backward_refuses_what_it_had_kept(step):
    given = tensors()
    weight = given["param"][2].requires_grad_()
    loss = weight.square().sum()
    versions = {name: [t._version for t in flat(given[name])] for name in ("param", "grad", "state", "estimate")}
    step(given)
    for name, then in versions.items():
        now = [t._version for t in flat(given[name])]
        assert now == [version + (name in ("param", "state")) for version in then], name
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_step
def test_the_profiler_and_dispatch_modes_see_one_op(step):
    given = tensors()
    with Recorder() as recorder, profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        step(given)
    name = "fillm_kernels::masked_adamw_" if step is adamw else "fillm_kernels::masked_sophia_"
    assert [op.name() for op, _ in recorder.calls] == [name]
    assert name in {event.key for event in profiled.key_averages()}


@every_step
def test_lists_compile_as_one_graph_and_give_the_same_bits(step):
    one = tensors()
    other = copy(one)

    def train(given: dict[str, Any]) -> list[torch.Tensor]:
        norm = masked_norm(given["grad"], given["mask"])
        return [*(param + 1 for param in step(given)), norm]

    torch._dynamo.reset()
    assert_same_bits(torch.compile(train, fullgraph=True, backend="aot_eager")(one), train(other))
    assert_same_bits(flat(list(one.values())), flat(list(other.values())))


@every_step
def test_fake_tensors_are_checked_and_not_stepped(step):
    given = tensors()
    with Recorder() as recorder:
        step(copy(given))
    op, arguments = recorder.calls[0]
    with FakeTensorMode() as mode:
        fake = changed({"all": list(arguments)}, lambda _, tensor: mode.from_tensor(tensor))["all"]
        assert op(*fake) is None
        fake[1][2] = fake[1][2][:, :5]
        with pytest.raises(ShapeError, match=r"\[3, 2049\] as param; got \[3, 5\]"):
            op(*fake)


@every_step
def test_a_mistake_in_one_leaves_all_as_they_were(step):
    def shorter(given, name):
        given[name] = given[name][:-1]

    def narrow_state(given):
        given["state"][2] = (given["state"][2][0], given["state"][2][1].half())

    def shared(given):
        given["grad"][2] = given["param"][2]

    def elsewhere(given):
        for name in ("param", "grad", "estimate"):
            given[name][2] = given[name][2].to("meta")
        given["state"][2] = tuple(tensor.to("meta") for tensor in given["state"][2])
        mask = given["mask"][2]
        given["mask"][2] = replace(mask, bits=mask.bits.to("meta"), starts=mask.starts.to("meta"))

    mistakes = [
        (lambda given: shorter(given, "grad"), ShapeError, r"one length, not empty; got \[5, 4, 5, 5\]"),
        (lambda given: [values.clear() for values in given.values()], ShapeError, r"not empty; got \[0, 0, 0, 0\]"),
        (lambda given: given["state"].__setitem__(2, given["state"][2] * 2), ShapeError, "two tensors; got 4"),
        (narrow_state, DtypeError, "state must be torch.float32"),
        (shared, ShapeError, "param and grad share memory"),
        (elsewhere, DeviceError, "one device"),
    ]
    if step is sophia:
        mistakes.append((lambda given: shorter(given, "estimate"), ShapeError, "one for each of 5 parameters; got 4"))
    for spoil, error, words in mistakes:
        given = tensors()
        kept = flat(list(given.values()))
        before = [tensor.clone() for tensor in kept]
        spoil(given)
        with pytest.raises(error, match=words):
            step(given)
        assert_same_bits(kept, before)


def test_gradients_of_one_norm_lie_on_one_device():
    selection = select_rows(torch.tensor([1]), (2, 3))
    away = replace(selection, rows=selection.rows.to("meta"), starts=selection.starts.to("meta"))
    with pytest.raises(DeviceError, match="one device"):
        masked_norm([torch.ones(2, 3), torch.ones(2, 3, device="meta")], [selection, away])
