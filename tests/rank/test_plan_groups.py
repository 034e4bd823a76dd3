"""A plan by groups of layers: the passes of all, the accumulators of one."""

import dataclasses

import pytest

from fillm.models import catalogue
from fillm.rank.layer_groups import layer_groups
from fillm.rank.plan import _check_memory, plan
from fillm.rank.plan_devices import Devices
from tests.families import build_family
from tests.rank.test_plan import CONFIG, RATES, SETS

MODEL = build_family("llama")
SCOPE = catalogue(MODEL)


def planned(groups, **settings):
    return plan(MODEL, SCOPE, SETS, dataclasses.replace(CONFIG, groups=groups, **settings), rates=RATES)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_every_group_goes_forward_and_each_weight_is_multiplied_once(groups):
    one, several = planned(1).flop, planned(groups).flop
    for name in ("forward", "backward of activations", "attention, forward and backward"):
        assert several[name] == pytest.approx(groups * one[name])
    for name in ("products with weights in scope", "ghost norms"):
        assert several[name] == pytest.approx(one[name])
    assert [p.name for p in planned(groups).passes] == [f"{p.name}, {groups} groups" for p in planned(1).passes]
    assert [p.samples for p in planned(groups).passes] == [groups * p.samples for p in planned(1).passes]


def test_accumulators_are_those_of_the_largest_group():
    parts = layer_groups(SCOPE, 2)
    numel = max(sum(info.numel for info in part) for part in parts)
    one, several = planned(1).memory, planned(2).memory
    assert several["mean forget gradient v"] == 4 * numel < one["mean forget gradient v"]
    assert several["weighted sums"] < one["weighted sums"]
    assert several["weights"] == one["weights"] and several["activations"] == one["activations"]
    assert any("largest group" in note for note in planned(2).notes)


def test_the_check_of_shards_keeps_gradients_of_the_largest_group():
    scope = [info for info in SCOPE if info.kind != "norm"]
    parts = layer_groups(scope, 2)

    def kept(groups):
        return _check_memory(MODEL, groups, Devices(2, sharded=True), "cpu")["gradients of two samples"]

    def half(infos):  # of the rows, rounded up
        return sum(-(-info.shape[0] // 2) * info.numel // info.shape[0] for info in infos)

    assert kept([scope]) == 2 * 4 * half(scope)
    assert kept(parts) == 2 * 4 * max(map(half, parts)) < kept([scope])
