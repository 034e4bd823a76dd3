import importlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from fillm_kernels import DtypeError, ShapeError, dispatch, native, outer_sketch, sample_moments, sketch
from fillm_kernels.sample_moments import Sketching, _cpu, _op, _reference, sketch_formed
from fillm_kernels.seed_law import BlockMap
from fillm_kernels.sketch import DENSE, SKETCHES
from fillm_kernels.sketch import _reference as sketch_in_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ragged import DTYPES, LENGTHS, WIDTHS, assert_within, gradients, precision, ragged

BACKENDS = ("cpu", "torch")
SPARSE = tuple(kind for kind in SKETCHES if kind not in DENSE)
SEED = 7


def sketched(x: Tensor, dy: Tensor, offsets: Tensor, dim: int, kind: str) -> Tensor:
    """Gradients formed outright and sketched by the definition, both in float64: [B, dim]."""
    return sketch_in_float64(gradients(x, dy, offsets).flatten(1), dim, kind, SEED, 4, 0)


def bound(x: Tensor, dy: Tensor, offsets: Tensor, dim: int, kind: str) -> Tensor:
    """How far a sketch may be off, [B, 1].

    An entry of G_b, a sum of T_b products in precision u, is off by at most (T_b + 2) u A, A the same sum of magnitudes
    (Higham 3.1). A bin adds n of them, in some order, and is scaled: (T_b + n + 4) u times the sum of A in the bin. In
    a dense kind every bin adds all I O of them, in blocks, times entries below 6 that are rounded themselves; the
    errors are of random sign, so that sqrt(I O) takes the place of n.
    """
    wide = gradients(x.abs(), dy.abs(), offsets).flatten(1)
    longest = max([int(n) for n in offsets.diff()], default=0)
    if kind in DENSE:
        terms, size = 4 * math.sqrt(wide.shape[1]) + 32, wide.sum(1, keepdim=True) * 6 / math.sqrt(dim)
    else:
        law, coordinate = BlockMap.of(kind, SEED, dim, 4), torch.arange(wide.shape[1])
        filled = torch.zeros(wide.shape[0] + 1, dim, dtype=torch.float64)
        for chunk in range(law.chunks):
            bins = law.place(coordinate, chunk)[0]
            filled.index_add_(1, bins, torch.cat([wide, torch.ones(1, wide.shape[1], dtype=torch.float64)]))
        terms, size = float(filled[-1].max()), filled[:-1].amax(1, keepdim=True)
    return (longest + terms + 64) * precision(x.dtype) * size + 1e-300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SKETCHES)
def test_it_is_the_sketch_of_the_flat_gradient(monkeypatch, backend, dtype, kind):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for lengths in LENGTHS:
        for width in WIDTHS[:4]:
            x, dy, offsets = ragged(lengths, *width, dtype)
            kept = x.clone(), dy.clone(), offsets.clone()
            # Fewer bins than a tile has columns, a prime or the next multiple of nonzeros, more bins than a row has.
            for dim in (37,) if kind in DENSE else (4, 64 if kind == "sjlt" else 61, 256):
                found = outer_sketch(x, dy, offsets, dim, kind, SEED)
                assert found.shape == (len(lengths), dim)
                assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                want = sketched(x, dy, offsets, dim, kind)
                assert_within(found, want, bound(x, dy, offsets, dim, kind))
                assert bool((found[offsets.diff() == 0] == 0).all())
            assert all(torch.equal(now, then) for now, then in zip((x, dy, offsets), kept, strict=True))


@pytest.fixture
def triton(monkeypatch) -> None:
    if not dispatch.interpreted():
        pytest.skip("Triton runs compiled where there is a GPU (benchmarks.gpu)")
    monkeypatch.setenv("FILLM_BACKEND", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SKETCHES)
def test_triton_in_the_interpreter(kind, dtype, triton):
    # Runs of bins narrower than a tile, as wide and wider, blocks that begin inside rows, several tiles and steps.
    cases = (([0, 1, 33], (9, 7), 32), ([0, 0], (16, 16), 8), ([3, 40], (65, 66), 116), ([0, 1, 33], (35, 20), 32))
    for lengths, width, dim in cases[:2] if kind in DENSE else cases:  # every entry of a dense kind costs a tile's time
        x, dy, offsets = ragged(lengths, *width, dtype)
        kept = x.clone(), dy.clone()
        found = outer_sketch(x, dy, offsets, dim, kind, SEED)
        assert_within(found, sketched(x, dy, offsets, dim, kind), bound(x, dy, offsets, dim, kind))
        assert bool((found[offsets.diff() == 0] == 0).all())
        assert torch.equal(x, kept[0]) and torch.equal(dy, kept[1])


@pytest.mark.parametrize("kind", SPARSE)
def test_triton_finds_everything_in_the_visit_that_sketches(kind, triton, monkeypatch):
    x, dy, offsets = ragged([9, 0, 70], 65, 40)
    v, second, absolute = torch.randn(40, 65), torch.zeros(40, 65), torch.zeros(40, 65)
    found = sample_moments(x, dy, offsets, v, second, absolute, rows=True, sketch_dim=64, kind=kind, seed=SEED)
    formed = gradients(x, dy, offsets)
    torch.testing.assert_close(found.squared_norms.double(), formed.square().sum((1, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.row_squared_norms.double(), formed.square().sum(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.dots.double(), (formed * v.double()).sum((1, 2)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(second.double(), formed.square().sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(absolute.double(), formed.abs().sum(0), rtol=1e-5, atol=1e-4)
    assert_within(found.sketch, sketched(x, dy, offsets, 64, kind), bound(x, dy, offsets, 64, kind))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "sjlt")) for kind in SPARSE])
def test_triton_adds_integers_whose_order_and_company_do_not_matter(kind, triton, monkeypatch):
    lengths = [3, 0, 20, 1] * 5  # more samples than a program takes where nothing is summed over them
    x, dy, offsets = ragged(lengths, 40, 70)
    x, dy = x.mul(4).round(), dy.mul(4).round()
    together = outer_sketch(x, dy, offsets, 116, kind, SEED)
    monkeypatch.setenv("FILLM_BACKEND", "cpu")
    assert torch.equal(together, sketch(gradients(x, dy, offsets).flatten(1).float(), 116, kind, SEED))
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    x, dy, offsets = ragged(lengths, 40, 70)
    together = outer_sketch(x, dy, offsets, 116, kind, SEED)
    for sample, (begin, end) in enumerate(pairwise(offsets.tolist())):
        alone = outer_sketch(x[begin:end], dy[begin:end], torch.tensor([0, end - begin]), 116, kind, SEED)
        assert torch.equal(alone[0], together[sample])


@pytest.mark.parametrize("size", [1e-18, 1e-9, 1.0, 1e9, 1e15])
def test_triton_scales_every_sample_to_its_own_size(size, triton):
    x, dy, offsets = ragged([9, 33, 5], 65, 40)
    dy[9:42] *= size  # the other samples keep theirs
    found = outer_sketch(x, dy, offsets, 64, "sjlt", SEED)
    assert_within(found, sketched(x, dy, offsets, 64, "sjlt"), bound(x, dy, offsets, 64, "sjlt"))


def test_triton_gives_a_sample_that_is_not_finite_a_sketch_that_is_not(triton):
    for bad in (torch.nan, torch.inf):
        x, dy, offsets = ragged([3, 4, 5], 20, 30)
        dy[4, 2] = bad
        with np.errstate(invalid="ignore"):  # numpy, the interpreter, warns where a GPU does not
            found = outer_sketch(x, dy, offsets, 16)
        assert found.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("which", native.instruction_sets())
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_instruction_set(which, kind, dtype):
    # More tokens than are packed at a time, more columns than a block has, and several parts of work items.
    x, dy, offsets = ragged([700, 1300, 9, 2100, 0, 3], 2100, 90, dtype)
    found = _cpu(x, dy, offsets, None, None, None, False, 1.0, Sketching(1028, kind, SEED, 4), which)[3]
    # The largest bin of A as in `bound`; forming [B, O, I] in float64 once is enough here.
    assert_within(found, sketched(x, dy, offsets, 1028, kind), bound(x, dy, offsets, 1028, kind))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SPARSE), st.integers(1, 90), st.integers(1, 90), st.integers(1, 130), st.integers(0, 2**63 - 1))
def test_bins_and_signs_are_those_of_sketch_to_the_bit(kind, inputs, outputs, dim, seed):
    # Gradients of small integers: every sum is exact in whatever order, so one wrong sign or bin shows.
    dim = -(-dim // 4) * 4 if kind == "sjlt" else dim
    x = torch.randint(-3, 4, (6, inputs)).float()
    dy, offsets = torch.randint(-3, 4, (6, outputs)).float(), torch.tensor([0, 2, 2, 6])
    formed = gradients(x, dy, offsets).flatten(1).float()
    assert torch.equal(outer_sketch(x, dy, offsets, dim, kind, seed), sketch(formed, dim, kind, seed))


@pytest.mark.parametrize("kind", SPARSE)
def test_bits_depend_neither_on_threads_nor_on_the_other_samples(kind):
    x, dy, offsets = ragged([5, 64, 0, 33, 1, 130], 300, 700)
    dy[dy == 0] = 0.5  # zero rows are skipped in some batches and multiplied by in others
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outer_sketch(x, dy, offsets, 1028, kind, SEED))
            outer_sketch(x * torch.nan, dy, offsets, 1028, kind, SEED)  # scratch memory, kept between calls
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    for sample, (begin, end) in enumerate(pairwise(offsets.tolist())):
        alone = outer_sketch(x[begin:end], dy[begin:end], torch.tensor([0, end - begin]), 1028, kind, SEED)
        assert torch.equal(alone[0], results[0][sample])


def test_samples_whose_bins_do_not_fit_in_memory_together():
    # 8 parts of 2^22 bins are all that 128 MiB hold: one sample after the other. float32 sums of small integers: exact.
    x, dy, offsets = ragged([2, 0, 3, 1], 40, 260)
    x, dy = x.round(), dy.round()
    formed = gradients(x, dy, offsets).flatten(1).float()
    assert torch.equal(outer_sketch(x, dy, offsets, 1 << 22, seed=3), sketch(formed, 1 << 22, seed=3))


def test_memory_is_written_before_it_is_read(monkeypatch):
    x, dy, offsets = ragged([0, 3, 0, 2], 20, 30)
    want = outer_sketch(x, dy, offsets, 64)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **options: empty_like(*a, **options).fill_(torch.nan))
    for lengths in ([0, 3, 0, 2], [0, 0]):
        x, dy, offsets = ragged(lengths, 20, 30)
        got = outer_sketch(x, dy, offsets, 64)
        assert bool(got.isfinite().all())
        assert sum(lengths) == 0 or torch.equal(got, want)
    assert outer_sketch(x, dy[:, :0], offsets, 8).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("kind", ["oporp", "gaussian"])
def test_what_else_is_asked_changes_no_bit(kind):
    x, dy, offsets = ragged([5, 64, 1, 0, 33], 65, 40)
    v, second, absolute = torch.randn(40, 65), torch.zeros(40, 65), torch.zeros(40, 65)
    plain = sample_moments(x, dy, offsets, v, one := second.clone(), two := absolute.clone(), rows=True, alpha=0.5)
    found = sample_moments(x, dy, offsets, v, second, absolute, rows=True, alpha=0.5, sketch_dim=64, kind=kind, seed=3)
    for got, want in zip(found[:3], plain[:3], strict=True):
        assert torch.equal(got, want)
    assert torch.equal(second, one) and torch.equal(absolute, two)
    assert plain.sketch is None
    assert torch.equal(found.sketch, outer_sketch(x, dy, offsets, 64, kind, 3))


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_strided_inputs(monkeypatch, backend, kind):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    x, dy, offsets = ragged([4, 70, 0, 9], 33, 50)
    got = outer_sketch(x.T.contiguous().T, dy.repeat(1, 2)[:, :50], offsets, 64, kind, SEED)
    assert_within(got, sketched(x, dy, offsets, 64, kind), bound(x, dy, offsets, 64, kind))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("kind", DENSE)
def test_gradients_are_formed_in_blocks_of_rows_whose_offsets_follow_the_law(monkeypatch, backend, kind):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    monkeypatch.setattr(importlib.import_module("fillm_kernels.sample_moments"), "BLOCK_ENTRIES", 64 * 33 * 7)
    x, dy, offsets = ragged([4, 7, 0, 9] * 20, 33, 50)  # more samples than are formed together, 8 blocks of rows
    seen = []

    def spy(formed: Tensor, *arguments: object) -> Tensor:
        seen.append((formed.shape[1], arguments[-1]))
        return sketch_in_float64(formed, *arguments).float()

    sketch_formed(x, dy, offsets, Sketching(16, kind, SEED, 4), spy)
    assert seen == 2 * [(min(7, 50 - row) * 33, row * 33) for row in range(0, 50, 7)]
    got = outer_sketch(x, dy, offsets, 16, kind, SEED)
    assert_within(got, sketched(x, dy, offsets, 16, kind), 2 * bound(x, dy, offsets, 16, kind))


@pytest.mark.parametrize(("kind", "seeds"), [(kind, 400) for kind in SPARSE] + [(kind, 200) for kind in DENSE])
def test_inner_products_of_rank_one_gradients_are_unbiased(kind, seeds):
    # Pairs of one-token samples, G = dy x^T: one with itself, two strangers, two that share dy. Their row length is a
    # multiple of dim: rows would pile up on the same bins if they were not placed at random. Standard deviation of
    # <S G, S H> at most ((|G|^2 |H|^2 + <G, H>^2) / dim)^1/2 (docs/kernels/sketch.md): the mean of n is within 4.5 of
    # its own deviations but for one time in 1e5.
    dim, dy, x = 32, torch.randn(3, 20), torch.randn(3, 64)
    dy[2] = dy[0]
    offsets, pairs = torch.arange(4), [(0, 0), (0, 1), (0, 2)]
    formed = gradients(x, dy, offsets).flatten(1)
    exact = torch.stack([formed[i] @ formed[j] for i, j in pairs])
    scale = torch.stack([(formed[i] @ formed[i]) * (formed[j] @ formed[j]) for i, j in pairs])
    deviation = ((scale + exact.square()) / dim).sqrt()
    errors = []
    for seed in range(seeds):
        s = outer_sketch(x, dy, offsets, dim, kind, seed).double()
        errors.append((torch.stack([s[i] @ s[j] for i, j in pairs]) - exact) / deviation)
    errors = torch.stack(errors)
    assert float(errors.mean(0).abs().max()) < 4.5 / math.sqrt(seeds)
    # Squares have a heavier tail: measured below 1.2 at either number of seeds; a map without signs gives 20 and more.
    assert float(errors.square().mean(0).max()) < 1.7


def test_nan_stays_with_its_sample():
    x, dy, offsets = ragged([3, 4, 5], 20, 30)
    dy[4, 2] = torch.nan
    for kind in SPARSE:
        assert outer_sketch(x, dy, offsets, 16, kind).isnan().any(1).tolist() == [False, True, False]


def test_opcheck_and_compile():
    x, dy, offsets = ragged([3, 0, 8], 9, 7)
    v, second = torch.randn(7, 9), torch.zeros(7, 9)
    torch.library.opcheck(_op, (x, dy, offsets, v, second, None, True, 0.5, 8, "oporp", 5, 4))
    torch.library.opcheck(_op, (x.double(), dy.double(), offsets, None, None, None, False, 1.0, 8, "sjlt", 5, 4))
    torch.library.opcheck(
        _op, (x.bfloat16(), dy.bfloat16(), offsets, None, None, None, False, 1.0, 8, "gaussian", 5, 4)
    )
    use = lambda x: 2 * outer_sketch(2 * x, dy, offsets, 8, "sjlt", 3)  # noqa: E731
    assert torch.equal(torch.compile(use, backend="aot_eager", fullgraph=True)(x), use(x))


def test_reference_is_the_reference_of_sketch_on_formed_gradients():
    x, dy, offsets = ragged([3, 0, 8], 9, 7, torch.float64)
    for kind in SKETCHES:
        found = _reference(x, dy, offsets, None, None, None, False, 1.0, Sketching(8, kind, SEED, 4))[3]
        torch.testing.assert_close(found, sketched(x, dy, offsets, 8, kind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dim": 0}, ShapeError, "dim must be in"),
        ({"dim": None}, DtypeError, "dim must be an integer"),
        ({"kind": "best"}, ShapeError, "kind must be one of oporp"),
        ({"kind": "tensorsketch"}, ShapeError, "got 'tensorsketch'"),
        ({"seed": -1}, ShapeError, r"seed must be in \[0, 2\^63\)"),
        ({"kind": "sjlt", "nonzeros": 3}, ShapeError, "multiple of nonzeros = 3"),
        ({"offsets": torch.tensor([0, 3, 2, 11])}, ShapeError, "offsets must not decrease"),
        ({"x": torch.ones(11, 9, dtype=torch.int64)}, DtypeError, "x"),
    ],
)
def test_mistakes_are_named(change, error, words):
    x, dy, offsets = ragged([3, 0, 8], 9, 7)
    with pytest.raises(error, match=words):
        outer_sketch(**{"x": x, "dy": dy, "offsets": offsets, "dim": 8, **change})


def test_numpy_arrays_come_in():
    x, dy, offsets = ragged([3, 0, 8], 9, 7)
    assert torch.equal(outer_sketch(x.numpy(), dy.numpy(), offsets.numpy(), 8), outer_sketch(x, dy, offsets, 8))
