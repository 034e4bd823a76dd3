"""Triton kernels that deal their sums out to several programs where a layer has too few tiles to fill a GPU."""

import pytest
import torch
from fillm_kernels import ghost_dot, weighted_outer_

from tests.kernels.ragged import assert_within, gradients, precision, ragged, triton_device

triton_outer = pytest.importorskip("fillm_kernels.triton.weighted_outer")
triton_dot = pytest.importorskip("fillm_kernels.triton.ghost_dot")
DEVICE = triton_device()
# Sums of at most 1203 terms in groups, added in order: random roundings, some 35 of them, of the sum of magnitudes.
ROUNDINGS = 64 * precision(torch.float32)


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "triton")


@pytest.fixture
def programs(monkeypatch):
    """Programs of every launch, by the kernel's name."""
    counts = []
    for module in (triton_outer, triton_dot):

        def spy(kernel, number, *arguments, launch=module.launch_kernel, **constants):
            counts.append(number)
            launch(kernel, number, *arguments, **constants)

        monkeypatch.setattr(module, "launch_kernel", spy)
    return counts


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 32), (17, 70)])
def test_rows_of_one_tile_are_dealt_out_and_added_up(inputs, outputs, dtype, weighted, programs):
    x, dy, offsets = ragged([3, 700, 0, 1, 450], inputs, outputs, dtype)
    weights = torch.randn(5) if weighted else None
    out = torch.randn(outputs, inputs)
    factors = (weights if weighted else torch.ones(5)).double()
    want = out.double() + torch.einsum("b,boi->oi", factors, gradients(x, dy, offsets))
    terms = torch.einsum("b,boi->oi", factors.abs(), gradients(x.abs(), dy.abs(), offsets))
    for whole in (out, out.T.contiguous().T):  # along rows, and along columns
        got = [whole.to(DEVICE, copy=True) for _ in range(2)]
        for one in got:
            weighted_outer_(one, x.to(DEVICE), dy.to(DEVICE), None if weights is None else weights.to(DEVICE), offsets)
        assert_within(got[0].cpu(), want, ROUNDINGS * (out.abs() + terms))
        assert torch.equal(got[0], got[1])
    assert min(programs) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_features_are_dealt_out_and_every_one_is_taken_once(dtype, programs):
    x, dy, offsets = ragged([3, 0, 20], 40, 1203, dtype)
    v = torch.randn(1203, 40)
    want = torch.einsum("boi,oi->b", gradients(x, dy, offsets), v.double())
    got = ghost_dot(x.to(DEVICE), dy.to(DEVICE), v.to(DEVICE), offsets).cpu()
    terms = torch.einsum("boi,oi->b", gradients(x.abs(), dy.abs(), offsets), v.double().abs())
    assert_within(got, want, ROUNDINGS * terms)
    assert min(programs) >= 2


def test_a_large_layer_is_not_dealt_out():
    bounds = tuple(range(0, 64001, 64))
    steps, share = triton_outer.plan(bounds, 64, triton_outer.ENOUGH_PROGRAMS)
    assert share == len(steps) == 1000 and steps[:, 2].tolist() == list(range(1000))
    steps, share = triton_outer.plan((0, 64000), 64, 4)
    assert share == 31 and (steps[:, 2] >= 0).nonzero().flatten().tolist() == [*range(30, 999, 31), 999]
