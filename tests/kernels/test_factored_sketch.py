import importlib
import math
from itertools import pairwise

import pytest
import torch
from fillm_kernels import BackendError, DtypeError, ShapeError, factored_sketch, native
from fillm_kernels.factored_sketch import _reference
from fillm_kernels.tensorsketch import from_gradients, is_cheaper_formed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ragged import DTYPES, LENGTHS, WIDTHS, assert_within, gradients, magnitudes, precision, ragged

BACKENDS = ("cpu", "torch", "reference")
MAPS = (
    ("factored", (5, 7)),
    ("factored-sjlt", (16, 12)),
    ("factored-sjlt", (7, 1)),
    ("tensorsketch", (64,)),
    ("tensorsketch", (7,)),
    ("tensorsketch", (1,)),
)
module = importlib.import_module("fillm_kernels.factored_sketch")


def bound(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    # Each row is sketched to within some 64 roundings of its size (n <= 1100 terms, random data), where the size of a
    # sketch is at most sqrt(n) times that of the row if all of it meets in few bins; then 64 more in the product or the
    # transform, of sum_t |x_t| |dy_t|.
    spread = math.sqrt(max(x.shape[1], 1) * max(dy.shape[1], 1))
    return (128 * precision(x.dtype) * spread * magnitudes(x, dy, offsets))[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "dims"), MAPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_with_gradients_sketched_in_float64(backend, kind, dims, dtype, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for lengths in LENGTHS:
        for inputs, outputs in WIDTHS[: 3 if backend == "torch" else 5]:
            x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
            got = factored_sketch(x, dy, offsets, dims, kind, 3)
            assert got.shape == (len(lengths), math.prod(dims))
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            if len(lengths):
                want = _reference(x, dy, offsets, list(dims), kind, 3)
                assert_within(got, want, bound(x, dy, offsets))


def test_a_factored_sketch_is_the_product_of_its_sides():
    # One token: G = dy x^T, so that the sketch is the outer product of two sketches, k_out slowest.
    x, dy, offsets = torch.randn(1, 9), torch.randn(1, 11), torch.tensor([0, 1])
    for kind in ("factored", "factored-sjlt"):
        two = factored_sketch(x, dy, offsets, (4, 8), kind, 5).view(4, 8)
        assert torch.linalg.matrix_rank(two.double(), rtol=1e-5) == 1
        assert torch.equal(factored_sketch(x, 2 * dy, offsets, (4, 8), kind, 5).view(4, 8), 2 * two)


@pytest.mark.parametrize(("kind", "dims"), [("factored", (8, 8)), ("factored-sjlt", (8, 8)), ("tensorsketch", (64,))])
def test_inner_products_are_unbiased_and_vary_no_more_than_the_bound(kind, dims):
    x, dy = torch.randn(12, 64), torch.randn(12, 48)
    x[5], dy[5] = torch.eye(64)[3], 1  # one heavy column
    x[6], dy[6] = 1, torch.eye(48)[7]  # one heavy row
    x[7], dy[7] = 1, 1  # a constant
    x[8], dy[8] = torch.eye(64)[0], torch.eye(48)[1]  # single entries on an anti-diagonal, where bins that add meet
    x[9], dy[9] = torch.eye(64)[1], torch.eye(48)[0]
    offsets = torch.tensor([0, 4, 5, 6, 7, 8, 9, 10, 12])
    formed = gradients(x, dy, offsets).flatten(1)
    exact, norms = formed @ formed.T, formed.square().sum(1)
    # Two sides with k rows each: (1 + 2 / k_out)(1 + 2 / k_in) - 1 of |G|^2 |H|^2. TensorSketch of degree 2: 11 / k
    # (Avron, Nguyen and Woodruff, NIPS 2014).
    factor = 11 / dims[0] if kind == "tensorsketch" else (1 + 2 / dims[0]) * (1 + 2 / dims[1]) - 1
    seeds, errors = 500, []
    for seed in range(seeds):
        s = factored_sketch(x.double(), dy.double(), offsets, dims, kind, seed)
        errors.append((s @ s.T - exact) / (norms[:, None] * norms).sqrt())
    errors = torch.stack(errors)
    assert float(errors.mean(0).abs().max()) < 4.5 * math.sqrt(factor / seeds)
    # Products of sums of few terms have heavy tails: a mean square over 500 draws is good to about a third.
    assert float(errors.square().mean(0).max()) < 1.4 * factor


@pytest.mark.parametrize(("kind", "dims"), MAPS)
def test_samples_do_not_depend_on_their_neighbours_nor_on_the_blocks(kind, dims, monkeypatch):
    x, dy, offsets = ragged([9, 0, 40, 3, 120], 33, 20)
    together = factored_sketch(x, dy, offsets, dims, kind, 3)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 50 * sum(dims))
    assert_within(factored_sketch(x, dy, offsets, dims, kind, 3), together.double(), bound(x, dy, offsets))
    for sample in range(5):
        rows = slice(int(offsets[sample]), int(offsets[sample + 1]))
        alone = factored_sketch(x[rows], dy[rows], torch.tensor([0, rows.stop - rows.start]), dims, kind, 3)
        assert_within(alone[0], together[sample].double(), bound(x, dy, offsets)[sample])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "dims"), MAPS)
def test_strided_inputs_are_read_as_they_are_and_left_unchanged(kind, dims, backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    wide, tall, offsets = torch.randn(30, 90), torch.randn(33, 60), torch.tensor([0, 11, 11, 30])
    for x, dy in [(wide[:, 7:50], wide[:, 50:]), (wide[:, ::3], tall.T[:30]), (wide[:1].expand(30, 90), wide[:, :5])]:
        before = x.clone(), dy.clone()
        got = factored_sketch(x, dy, offsets, dims, kind, 3)
        assert_within(got, _reference(*before, offsets, list(dims), kind, 3), bound(x, dy, offsets))
        assert torch.equal(x, before[0])
        assert torch.equal(dy, before[1])


@pytest.mark.parametrize(("kind", "dims"), MAPS)
def test_bits_are_the_same_from_run_to_run_and_nan_stays_in_its_sample(kind, dims):
    x, dy, offsets = ragged([9, 4, 30], 33, 20)
    dy[10] = 1
    once = factored_sketch(x, dy, offsets, dims, kind, 3)
    assert torch.equal(factored_sketch(x, dy, offsets, dims, kind, 3), once)
    x[10] = torch.nan
    got = factored_sketch(x, dy, offsets, dims, kind, 3)
    assert got.isfinite().all(1).tolist() == [True, False, True]
    assert_within(got[[0, 2]], once[[0, 2]].double(), bound(x.nan_to_num(), dy, offsets)[[0, 2]])


def test_one_dimension_serves_both_sides():
    x, dy, offsets = ragged([3, 5], 6, 7)
    both = factored_sketch(x, dy, offsets, (4, 4), "factored-sjlt", 1)
    assert torch.equal(factored_sketch(x, dy, offsets, 4, "factored-sjlt", 1), both)
    assert factored_sketch(x, dy, offsets, 8, "tensorsketch").shape == (2, 8)
    assert torch.equal(factored_sketch(x.numpy(), dy.numpy(), offsets.numpy(), 4, "factored-sjlt", 1), both)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "dims"), MAPS)
def test_several_maps_lie_side_by_side(backend, kind, dims, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    x, dy, offsets = ragged([3, 0, 40], 33, 20)
    got = factored_sketch(x, dy, offsets, dims, kind, [5, 2**62, 5])
    assert got.shape == (3, 3 * math.prod(dims))
    for at, seed in enumerate((5, 2**62, 5)):
        part = got[:, at * math.prod(dims) : (at + 1) * math.prod(dims)]
        assert torch.equal(part, factored_sketch(x, dy, offsets, dims, kind, seed))


@pytest.mark.parametrize("dims", [(1, 1), (6, 3), (8, 16), (16, 40), (130, 17)])
@pytest.mark.parametrize("kind", ["factored", "factored-sjlt"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_instruction_set_and_width_of_a_side(instruction_set, dtype, kind, dims):
    for inputs, outputs in WIDTHS[:4]:
        x, dy, offsets = ragged([9, 0, 40, 1, 33], inputs, outputs, dtype)
        got = module._cpu(x, dy, offsets, list(dims), kind, [3, 9], instruction_set)
        want = [_reference(x, dy, offsets, list(dims), kind, seed) for seed in (3, 9)]
        assert_within(got, torch.cat(want, 1), bound(x, dy, offsets))


@pytest.mark.parametrize("way", [from_gradients, module._from_spectra])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_both_ways_to_a_tensorsketch_on_every_instruction_set(instruction_set, dtype, way):
    # 19 samples fill a vector of lanes and a part of the next; blocks of 42 x 128 entries, whole and not.
    lengths = [9, 0, 40, 1, 33, *range(14)]
    for inputs, outputs in ((1, 1), (7, 130), (131, 43), (64, 64)):
        x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
        for dim in (1, 7, 40, 600):
            got = way(x, dy, offsets, dim, [3, 9], instruction_set)
            want = [_reference(x, dy, offsets, [dim], "tensorsketch", seed) for seed in (3, 9)]
            assert_within(got, torch.cat(want, 1), bound(x, dy, offsets))


def test_the_cheaper_way_is_a_samples_own_choice():
    # Transforms of a token cost the same however large the gradient is; to form it pays for many tokens.
    lengths = torch.tensor([0, 1, 30, 300])
    assert is_cheaper_formed(lengths, 256, 256, 2048, 2).tolist() == [False, False, True, True]
    assert is_cheaper_formed(lengths, 4096, 4096, 64, 2).tolist() == [False] * 4
    assert not is_cheaper_formed(lengths[:0], 8, 8, 8, 1).any()


def test_a_batch_in_which_samples_go_both_ways():
    lengths = [0, 30, 1, 60, 1, 0]
    x, dy, offsets = ragged(lengths, 64, 60)
    chosen = is_cheaper_formed(offsets.diff(), 64, 60, 64, 2)
    assert chosen.tolist() == [False, True, False, True, False, False]
    got = factored_sketch(x, dy, offsets, 64, "tensorsketch", [3, 9])
    want = [_reference(x, dy, offsets, [64], "tensorsketch", seed) for seed in (3, 9)]
    assert_within(got, torch.cat(want, 1), bound(x, dy, offsets))


def test_neither_threads_nor_neighbours_change_a_bit_of_what_is_formed(monkeypatch):
    x, dy, offsets = ragged([*range(35)], 70, 90)  # large enough for parts with bins of their own
    before, results = torch.get_num_threads(), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(from_gradients(x, dy, offsets, 40, [3, 4], ""))
    finally:
        torch.set_num_threads(before)
    bounds = list(pairwise(offsets.tolist()))
    alone = [from_gradients(x[a:b], dy[a:b], torch.tensor([0, b - a]), 40, [3, 4], "") for a, b in bounds]
    assert all(torch.equal(result, results[0]) for result in (*results[1:], torch.cat(alone)))


def test_blocks_of_rows_and_neighbours_change_no_bit_of_sparse_sides():
    # 512 + 512 projected numbers a row and map: a block ends every 1024 rows, within the long sample.
    x, dy, offsets = ragged([7, 2500, 3, 900], 20, 9)
    together = factored_sketch(x, dy, offsets, (512, 512), "factored-sjlt", [3, 4])
    for sample in range(4):
        rows = slice(int(offsets[sample]), int(offsets[sample + 1]))
        alone = torch.tensor([0, rows.stop - rows.start])
        got = factored_sketch(x[rows], dy[rows], alone, (512, 512), "factored-sjlt", [3, 4])
        assert torch.equal(got[0], together[sample])


@pytest.mark.parametrize(
    ("dims", "kind", "seed", "words"),
    [
        ((4, 4), "best", 0, "kind must be one of factored"),
        ((4, 4, 4), "factored", 0, r"dims must be \(k_out, k_in\)"),
        ((4, 4), "tensorsketch", 0, "one k for tensorsketch"),
        ((4, 0), "factored", 0, "at least 1"),
        ((1 << 16, 1 << 16), "factored", 0, "at most 2"),
        ((4, 4), "factored", -1, "seed must be"),
        ((4, 4), "factored", [1, -1], "seed must be"),
        ((4, 4), "factored", [], "one seed or several"),
    ],
)
def test_what_does_not_fit_is_refused(dims, kind, seed, words, monkeypatch):
    x, dy, offsets = ragged([3, 5], 6, 7)
    with pytest.raises(ShapeError, match=words):
        factored_sketch(x, dy, offsets, dims, kind, seed)
    with pytest.raises(ShapeError, match="from 0 to N"):
        factored_sketch(x, dy, offsets[:-1], 4)
    with pytest.raises(DtypeError, match="share one of"):
        factored_sketch(x, dy.double(), offsets, 4)
    monkeypatch.setenv("FILLM_BACKEND", "vulkan")
    with pytest.raises(BackendError, match="no such backend"):
        factored_sketch(x, dy, offsets, 4)


def test_custom_op_is_registered_as_torch_expects():
    for (kind, dims), dtype in zip(MAPS[1:4], (torch.float32, torch.float64, torch.bfloat16), strict=True):
        x, dy, offsets = ragged([3, 0, 5], 6, 7, dtype)
        arguments = (x, dy, offsets, list(dims), kind, [3, 4])
        torch.library.opcheck(torch.ops.fillm_kernels.factored_sketch.default, arguments)


def test_compiles_as_one_graph():
    x, dy, offsets = ragged([3, 0, 5], 6, 7)
    compiled = torch.compile(lambda *a: factored_sketch(*a, 4) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, dy, offsets), factored_sketch(x, dy, offsets, 4) + 1)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(MAPS), st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(-9, 9))
def test_scaling_by_a_power_of_two_scales_the_sketch_to_the_bit(one, lengths, exponent):
    kind, dims = one
    x, dy, offsets = ragged(lengths, 19, 23)
    small = factored_sketch(x, dy, offsets, dims, kind, 3)
    assert torch.equal(factored_sketch(x, dy * 2.0**exponent, offsets, dims, kind, 3), small * 2.0**exponent)


@pytest.mark.skipif(native.extension is None, reason="library sums and products have an order of their own")
@pytest.mark.parametrize(("kind", "dims"), [("factored", (5, 6)), ("factored-sjlt", (8, 4))])
def test_neither_threads_nor_neighbours_change_a_bit(kind, dims, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "cpu")
    x, dy, offsets = torch.randn(705, 67), torch.randn(705, 33), torch.tensor([0, 700, 700, 705])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(factored_sketch(x, dy, offsets, dims, kind, 3))
    finally:
        torch.set_num_threads(before)
    results.append(torch.cat([factored_sketch(x[a:b], dy[a:b], offsets[:2].clamp(max=b - a), dims, kind, 3)
                              for a, b in ((0, 700), (700, 700), (700, 705))]))  # fmt: skip
    assert all(torch.equal(result, results[0]) for result in results[1:])
