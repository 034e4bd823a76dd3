import numpy as np
import pytest
import torch
from fillm_kernels import DtypeError, ShapeError, ghost_dot, weighted_outer_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ragged import DTYPES, LENGTHS, WIDTHS, assert_within, gradients, precision, ragged

BACKENDS = ("cpu", "torch", "reference")


def summed(x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor, alpha: float = 1.0) -> Tensor:
    weights = torch.ones(len(offsets) - 1) if weights is None else weights
    return alpha * torch.einsum("b,boi->oi", weights.double(), gradients(x, dy, offsets))


def bound(out: Tensor, x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor, alpha: float = 1.0) -> Tensor:
    # One dot product over the tokens of all samples, scaled and added: some 32 roundings of the sum of magnitudes.
    weights = None if weights is None else weights.abs()
    return 32 * precision(x.dtype) * (out.abs() + summed(x.abs(), dy.abs(), weights, offsets, abs(alpha)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_with_gradients_formed_in_float64(backend, dtype, weighted, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for lengths in LENGTHS:
        for inputs, outputs in WIDTHS:
            x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
            out = torch.randn(outputs, inputs, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            weights = torch.randn(len(lengths)) if weighted else None
            want = out.double() + summed(x, dy, weights, offsets, -0.5)
            room = bound(out, x, dy, weights, offsets, -0.5)
            assert weighted_outer_(out, x, dy, weights, offsets, alpha=-0.5) is out
            assert_within(out, want, room)


@pytest.mark.parametrize("backend", ("cpu", "torch"))
def test_rows_are_taken_in_blocks(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    monkeypatch.setitem(weighted_outer_.__globals__, "BLOCK_ROWS", 7)
    for dtype in DTYPES:
        x, dy, offsets = ragged([29, 1, 0, 30], 20, 30, dtype)
        out = torch.zeros(30, 20, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for weights in (None, torch.randn(4)):
            want, room = out + summed(x, dy, weights, offsets), bound(out, x, dy, weights, offsets)
            assert_within(weighted_outer_(out, x, dy, weights, offsets), want, room)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_added_to_in_place_and_nothing_beside_them(backend, weighted, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    x, dy, offsets = ragged([5, 0, 9], 6, 4)
    weights = torch.randn(3) if weighted else None
    for make in (
        lambda room: room.new_zeros(6, 4).T,  # a Conv1D accumulator
        lambda room: room[1, :4, :6],  # one expert of several
        lambda room: room[:, :, 3].T[:4, :6],  # every stride odd
        lambda room: room[2, 1:9:2, 2:8],  # every other row
        lambda room: room[2, :4, ::2],  # entries apart
    ):
        room = torch.randn(8, 9, 12)
        out = make(room)
        untouched = room.clone()
        want, within = out + summed(x, dy, weights, offsets), bound(out, x, dy, weights, offsets)
        weighted_outer_(out, x, dy, weights, offsets)
        assert_within(out, want, within)
        make(untouched).copy_(out)
        assert torch.equal(room, untouched)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_as_they_are_and_left_unchanged(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    wide, tall, offsets = torch.randn(30, 90), torch.randn(33, 60), torch.tensor([0, 11, 11, 30])
    weights = torch.randn(6)[::2]
    for x, dy in [(wide[:, 7:50], wide[:, 50:]), (wide[:, ::3], tall.T[:30]), (wide[:1].expand(30, 90), wide[:, :5])]:
        before = x.clone(), dy.clone(), weights.clone()
        out = torch.zeros(dy.shape[1], x.shape[1])
        room = bound(out, x, dy, weights, offsets)
        assert_within(weighted_outer_(out, x, dy, weights, offsets), summed(x, dy, weights, offsets), room)
        assert all(torch.equal(now, then) for now, then in zip((x, dy, weights), before, strict=True))


def test_float64_accumulator_takes_float32_inputs():
    x, dy, offsets = ragged([50, 60], 6, 7)
    out = torch.zeros(7, 6, dtype=torch.float64)
    weights = torch.rand(2)
    weighted_outer_(out, x, dy, weights, offsets)
    assert_within(out, summed(x, dy, weights, offsets), 2.0**-45)


def test_zero_rows_are_not_multiplied(monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "cpu")
    x, dy, offsets = ragged([6, 4], 5, 20)
    dy[[0, 3, 9]] = 0
    want = summed(x, dy, None, offsets)
    x[[0, 3, 9]] = torch.nan
    assert_within(weighted_outer_(torch.zeros(20, 5), x, dy, None, offsets), want, 1e-5)


def test_numpy_accumulator_is_written_through():
    x, dy, offsets = ragged([3, 5], 6, 7)
    out = np.zeros((7, 6), dtype=np.float32)
    returned = weighted_outer_(out, x.numpy(), dy.numpy(), np.ones(2), offsets.numpy())
    assert_within(torch.from_numpy(out), summed(x, dy, None, offsets), 1e-5)
    assert returned.data_ptr() == out.ctypes.data


def test_what_does_not_fit_is_refused_before_anything_is_written():
    x, dy, offsets = torch.ones(4, 3), torch.ones(4, 2), torch.tensor([0, 1, 4])
    out = torch.zeros(2, 3)
    locked = np.zeros((2, 3), dtype=np.float32)
    locked.flags.writeable = False
    for arguments, error, words in [
        ((out.T, x, dy, None, offsets), ShapeError, r"out must be \[O, I\] = \[2, 3\]; got \[3, 2\]"),
        ((out[:1].expand(2, 3), x, dy, None, offsets), ShapeError, "share memory"),
        ((out.half(), x, dy, None, offsets), DtypeError, "out must be float32 or float64"),
        ((out, x.double(), dy.double(), None, offsets), DtypeError, "no narrower than x"),
        ((out, x, dy, torch.ones(3), offsets), ShapeError, r"weights must be \[B\] = \[2\]; got \[3\]"),
        ((out, x, dy, torch.ones(2, dtype=torch.int64), offsets), DtypeError, "weights must be floating"),
        ((out, x, dy, None, torch.tensor([0, 5, 4])), ShapeError, "must not decrease"),
        ((locked, x, dy, None, offsets), DtypeError, "out is read-only"),
    ]:
        with pytest.raises(error, match=words):
            weighted_outer_(*arguments)
    assert not out.any()
    assert not locked.any()


lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_adjoint_of_ghost_dot(lengths, inputs, outputs, seed):
    # < sum_b w_b G_b , v > = sum_b w_b < G_b , v >
    x, dy, offsets = ragged(lengths, inputs, outputs, torch.float64, seed)
    weights, v = torch.randn(len(lengths)).double(), torch.randn(outputs, inputs).double()
    out = weighted_outer_(torch.zeros_like(v), x, dy, weights, offsets)
    room = (bound(torch.zeros_like(v), x, dy, weights, offsets) * v.abs()).sum() + 1e-300
    assert_within((out * v).sum(), (weights * ghost_dot(x, dy, v, offsets)).sum(), 4 * room)


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, st.integers(0, 6), st.integers(0, 99))
def test_splitting_the_samples_over_calls_changes_rounding_only(lengths, cut, seed):
    x, dy, offsets = ragged(lengths, 19, 23, seed=seed)
    weights, cut = torch.randn(len(lengths)), min(cut, len(lengths))
    row = int(offsets[cut])
    once = weighted_outer_(torch.zeros(23, 19), x, dy, weights, offsets)
    twice = weighted_outer_(torch.zeros(23, 19), x[:row], dy[:row], weights[:cut], offsets[: cut + 1])
    weighted_outer_(twice, x[row:], dy[row:], weights[cut:], offsets[cut:] - row)
    assert_within(twice, once, 2 * bound(torch.zeros(23, 19), x, dy, weights, offsets))
