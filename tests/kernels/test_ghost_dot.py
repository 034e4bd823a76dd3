import pytest
import torch
from fillm_kernels import DeviceError, DtypeError, ShapeError, ghost_dot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ragged import DTYPES, LENGTHS, WIDTHS, assert_within, gradients, magnitudes, precision, ragged

BACKENDS = ("cpu", "torch", "reference")


def dots(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    return torch.einsum("boi,oi->b", gradients(x, dy, offsets), v.double())


def bound(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    # Two chained dot products of n <= 1100 terms in blocks: some 32 roundings of sum_t |dy_t| |v| |x_t| on random data.
    return 32 * precision(x.dtype) * magnitudes(x, dy, offsets) * v.double().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_with_gradients_formed_in_float64(backend, dtype, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for lengths in LENGTHS:
        for inputs, outputs in WIDTHS:
            for v_dtype in {dtype, wide}:
                x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
                v = torch.randn(outputs, inputs).to(v_dtype)
                got = ghost_dot(x, dy, v, offsets)
                assert got.shape == (len(lengths),)
                assert got.dtype == wide
                assert_within(got, dots(x, dy, v, offsets), bound(x, dy, v, offsets))


@pytest.mark.parametrize("backend", ("cpu", "torch"))
@pytest.mark.parametrize(("inputs", "outputs"), [(20, 30), (30, 20)])
def test_rows_are_taken_in_blocks(backend, inputs, outputs, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    monkeypatch.setitem(ghost_dot.__globals__, "BLOCK_ENTRIES", 1)
    x, dy, offsets = ragged([129, 1, 0, 300], inputs, outputs)
    v = torch.randn(outputs, inputs)
    assert_within(ghost_dot(x, dy, v, offsets), dots(x, dy, v, offsets), bound(x, dy, v, offsets))


@pytest.mark.parametrize("backend", ("cpu", "torch"))
def test_memory_that_was_never_written_does_not_reach_the_result(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    x, dy, offsets = ragged([70, 33, 0], 37, 41)
    v = torch.randn(41, 37)
    want = ghost_dot(x, dy, v, offsets)
    monkeypatch.setattr(
        torch, "empty", lambda *size, **o: torch.full(size, 1 if o["dtype"] == torch.bool else torch.nan, **o)
    )
    assert torch.equal(ghost_dot(x, dy, v, offsets), want)


def test_zero_rows_are_not_multiplied(monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "cpu")
    x, dy, offsets = ragged([6, 4, 3], 33, 20)
    dy[[0, 3, 9, 10, 11, 12]] = 0
    v = torch.randn(20, 33)
    want = dots(x, dy, v, offsets)
    x[[0, 3, 9]] = torch.nan
    assert_within(ghost_dot(x, dy, v, offsets), want, bound(x.nan_to_num(), dy, v, offsets))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_as_they_are_and_left_unchanged(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    wide, tall, offsets = torch.randn(30, 90), torch.randn(33, 60), torch.tensor([0, 11, 11, 30])
    for x, dy in [
        (wide[:, 7:50], wide[:, 50:]),
        (wide[:, ::3], tall.T[:30]),
        (wide[:1].expand(30, 90), wide[:, :5]),
    ]:
        for v in (torch.randn(x.shape[1], dy.shape[1]).T, torch.randn(dy.shape[1], 2 * x.shape[1])[:, ::2]):
            before = x.clone(), dy.clone(), v.clone()
            got = ghost_dot(x, dy, v, offsets)
            assert_within(got, dots(x, dy, v, offsets), bound(x, dy, v, offsets))
            assert all(torch.equal(now, then) for now, then in zip((x, dy, v), before, strict=True))


@pytest.mark.parametrize("precision_name", ["medium", "high"])
def test_reduced_float32_products_stay_out(precision_name):
    # torch.set_float32_matmul_precision lets float32 products run on bfloat16 or TF32 units, wrong by 2^-9 or 2^-11.
    x, dy, offsets = ragged([200, 100], 128, 192)
    v = torch.randn(192, 128)
    before = torch.get_float32_matmul_precision()
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    try:
        torch.set_float32_matmul_precision(precision_name)
        asked = [switch.fp32_precision for switch in switches]
        assert_within(ghost_dot(x, dy, v, offsets), dots(x, dy, v, offsets), bound(x, dy, v, offsets))
        assert [switch.fp32_precision for switch in switches] == asked
    finally:
        torch.set_float32_matmul_precision(before)


def test_row_numbers_beyond_32_bits():
    stride = 2**31 + 7
    x = torch.empty(stride + 16, dtype=torch.float16).as_strided((2, 8), (stride, 1))
    x.copy_(torch.arange(16.0).view(2, 8))
    dy, offsets = torch.tensor([[1.0], [2.0]]).half(), torch.tensor([0, 1, 2])
    assert ghost_dot(x, dy, torch.ones(1, 8), offsets).tolist() == [28.0, 2 * 92.0]
    assert ghost_dot(dy, x, torch.ones(8, 1), offsets).tolist() == [28.0, 2 * 92.0]


def test_what_does_not_fit_is_refused():
    x, dy, offsets = torch.ones(4, 3), torch.ones(4, 2), torch.tensor([0, 4])
    with pytest.raises(ShapeError, match=r"v must be \[O, I\] = \[2, 3\]; got \[3, 2\]"):
        ghost_dot(x, dy, torch.ones(3, 2), offsets)
    with pytest.raises(ShapeError, match="from 0 to 3"):
        ghost_dot(x, dy, torch.ones(2, 3), offsets - torch.tensor([0, 1]))
    with pytest.raises(DtypeError, match=r"v must be torch.float32"):
        ghost_dot(x, dy, torch.ones(2, 3).double(), offsets)
    with pytest.raises(DtypeError, match="v is a float"):
        ghost_dot(x, dy, 1.0, offsets)
    with pytest.raises(DeviceError, match="one device"):
        ghost_dot(x, dy.to("meta"), torch.ones(2, 3), offsets)


def test_custom_op_is_registered_as_torch_expects():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, dy, offsets = ragged([3, 0, 5], 6, 7, dtype)
        torch.library.opcheck(torch.ops.fillm_kernels.ghost_dot.default, (x, dy, torch.randn(7, 6).to(dtype), offsets))


def test_compiles_as_one_graph():
    x, dy, offsets = ragged([3, 0, 5], 6, 7)
    v = torch.randn(7, 6)
    compiled = torch.compile(lambda *a: ghost_dot(*a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, dy, v, offsets), ghost_dot(x, dy, v, offsets) * 2)


lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, st.integers(1, 70), st.integers(1, 70), st.floats(-8, 8, width=32), st.integers(0, 99))
def test_linear_in_v(lengths, inputs, outputs, factor, seed):
    x, dy, offsets = ragged(lengths, inputs, outputs, torch.float64, seed)
    v, other = torch.randn(2, outputs, inputs, dtype=torch.float64)
    got = ghost_dot(x, dy, v + factor * other, offsets)
    want = ghost_dot(x, dy, v, offsets) + factor * ghost_dot(x, dy, other, offsets)
    room = bound(x, dy, v, offsets) + abs(factor) * bound(x, dy, other, offsets)
    assert_within(got, want, 2 * room)


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_a_dot_does_not_depend_on_who_else_is_in_the_call(lengths, inputs, outputs, seed):
    x, dy, offsets = ragged(lengths, inputs, outputs, seed=seed)
    v = torch.randn(outputs, inputs)
    together, room = ghost_dot(x, dy, v, offsets), bound(x, dy, v, offsets)
    for sample, length in enumerate(lengths):
        rows = slice(int(offsets[sample]), int(offsets[sample + 1]))
        assert_within(ghost_dot(x[rows], dy[rows], v, torch.tensor([0, length]))[0], together[sample], room[sample])
