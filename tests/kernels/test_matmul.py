"""The C++ product behind `linear`, `ghost_dot` and `weighted_outer_`, against float64 products of torch."""

import pytest
import torch
from fillm_kernels import native
from fillm_kernels.ghost_dot import _cpu as ghost_dot_cpu
from fillm_kernels.products import linear
from fillm_kernels.weighted_outer import _cpu as weighted_outer_cpu
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.ragged import DTYPES, assert_within, precision, ragged

# Both sides of the register tile (14 x 32, 6 x 16, 6 x 8), of the 256 terms of a block, of the 4096 packed columns.
SIZES = [(1, 1, 1), (14, 32, 256), (15, 33, 257), (63, 65, 7), (129, 4100, 31), (2060, 40, 300), (5, 3, 1030)]
SETS = native.instruction_sets()
pytestmark = pytest.mark.skipif(native.extension is None, reason="needs the compiled extension")


def matmul(a, b, out, *, rows=None, scale=None, bias=None, alpha=1.0, accumulate=False, threads=2, which=""):
    native.extension.matmul_into(
        m=out.shape[0],
        n=out.shape[1],
        k=a.shape[1] if rows is None else len(rows),
        a=native.address(a),
        b=native.address(b),
        out=native.address(out),
        k_rows=0 if rows is None else rows.data_ptr(),
        k_scale=0 if scale is None else scale.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        alpha=alpha,
        accumulate=accumulate,
        threads=threads,
        instruction_set=which,
    )
    return out


def bound(a, b, terms, unit):
    # A sum of k products, each rounded, in any order: k u sum |a||b| (Higham, Accuracy and Stability, 3.1), and one
    # rounding more for alpha, bias and what was there.
    return (terms + 4) * unit * (a.double().abs() @ b.double().abs() + 1.0)


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_of_any_strides(which, m, n, k, dtype):
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    want, limit = a.double() @ b.double(), bound(a, b, k, precision(dtype))
    padded = torch.randn(m, 2 * k, dtype=dtype)
    padded[:, ::2] = a
    for left in (a, a.T.contiguous().T, padded[:, ::2]):
        for right in (b, b.T.contiguous().T):
            whole = torch.full((m, 2 * n), torch.nan, dtype=dtype)
            for out in (whole[:, :n], torch.full((n, m), torch.nan, dtype=dtype).T, whole[:, ::2]):
                assert_within(matmul(left, right, out, which=which), want, limit)
            assert bool(whole[:, n + (n + 1) % 2 :: 2].isnan().all())  # never written by any of the three


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", SETS)
def test_half_precision_operands_are_widened_exactly(which, dtype):
    a, b = torch.randn(37, 300).to(dtype), torch.randn(300, 70).to(dtype)
    a[3, 5] = torch.finfo(dtype).smallest_normal / 4
    out = matmul(a, b, torch.full((37, 70), torch.nan), which=which)
    assert_within(out, a.double() @ b.double(), bound(a, b, 300, 2.0**-24))
    mixed = matmul(a, b.float(), torch.full((37, 70), torch.nan), which=which)
    assert torch.equal(mixed, out)


@pytest.mark.parametrize("which", SETS)
def test_chosen_and_scaled_terms_bias_factor_and_sum(which):
    a, b = torch.randn(50, 400), torch.randn(400, 45)
    rows, scale = torch.randperm(400)[:313], torch.randn(400, dtype=torch.float64)
    before, bias = torch.randn(50, 45), torch.randn(45)
    chosen = (a.double()[:, rows] * scale[rows]) @ b.double()[rows]
    limit = 4 * bound(a[:, rows] * scale[rows].abs(), b[rows], 313, 2.0**-24)
    out = matmul(a, b, before.clone(), rows=rows, scale=scale, alpha=-0.5, accumulate=True, which=which)
    assert_within(out, before.double() - 0.5 * chosen, limit)
    fresh = matmul(a, b, torch.full((50, 45), torch.nan), rows=rows, scale=scale, bias=bias, which=which)
    assert_within(fresh, chosen + bias.double(), limit)


def test_no_terms_leave_the_bias_zeros_or_what_was_there():
    a, b, bias = torch.empty(3, 0), torch.empty(0, 4), torch.arange(4.0)
    assert torch.equal(matmul(a, b, torch.full((3, 4), torch.nan)), torch.zeros(3, 4))
    assert torch.equal(matmul(a, b, torch.full((3, 4), torch.nan), bias=bias), bias.expand(3, 4))
    assert torch.equal(matmul(a, b, torch.ones(3, 4), accumulate=True), torch.ones(3, 4))
    matmul(torch.empty(0, 5), torch.randn(5, 4), torch.empty(0, 4))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 300), st.integers(1, 520), st.integers(0, 2**31))
def test_bits_depend_neither_on_threads_nor_on_the_other_rows(m, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    one = matmul(a, b, torch.empty(m, n), threads=1)
    assert torch.equal(one, matmul(a, b, torch.empty(m, n), threads=2))
    first = m // 2
    assert torch.equal(one[first:], matmul(a[first:], b, torch.empty(m - first, n)))


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_ops_on_every_instruction_set(which, dtype):
    x, dy, offsets = ragged([3, 0, 65, 130, 7], 70, 45, dtype)
    v = torch.randn(45, 70, dtype=torch.promote_types(dtype, torch.float32))
    dots = ghost_dot_cpu(x, dy, v, offsets, which)
    rows = (dy.double() @ v.double() * x.double()).sum(1)
    want = torch.stack([part.sum() for part in rows.tensor_split(offsets[1:-1].tolist())])
    spread = ((dy.double().abs() @ v.double().abs()) * x.double().abs()).sum() * 120 * precision(dtype)
    assert_within(dots, want, spread)
    weights = torch.tensor([0.5, 2.0, 0.0, -1.0, 3.0], dtype=torch.float64)
    out = torch.zeros(45, 70, dtype=v.dtype)
    weighted_outer_cpu(out, x, dy, weights, offsets, 0.25, which)
    each = torch.repeat_interleave(weights, offsets.diff())[:, None]
    total = 0.25 * (dy.double() * each).T @ x.double()
    assert_within(out, total, 210 * precision(dtype) * ((dy.double() * each).abs().T @ x.double().abs() + 1e-3))


@pytest.mark.parametrize("bias", [None, torch.randn(700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_is_torch_linear(bias, dtype):
    # 3 x 40 x 90 x 700 multiply-adds are enough for the extension, a sixtieth of them is not.
    x, weight = torch.randn(3, 40, 90, dtype=dtype), torch.randn(700, 90, dtype=dtype)
    shift = None if bias is None else bias.to(dtype)
    for inputs in (x, x[:, :2], x.transpose(0, 1)):
        for matrix in (weight, weight.T.contiguous().T):
            got, want = linear(inputs, matrix, shift), torch.nn.functional.linear(inputs, matrix, shift)
            assert got.shape == want.shape and got.dtype == want.dtype
            eps = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            assert float((got - want).norm()) <= eps * float(want.norm())


def test_linear_leaves_mistakes_to_torch():
    with pytest.raises(RuntimeError, match=r"mat1|shape|size"):
        linear(torch.randn(2000, 90), torch.randn(700, 91))
    with pytest.raises(RuntimeError, match=r"dtype"):
        linear(torch.randn(2000, 90), torch.randn(700, 90, dtype=torch.float64))
