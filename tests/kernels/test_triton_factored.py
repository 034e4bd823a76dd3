"""The Triton kernels of factored_sketch."""

import math
from itertools import pairwise

import numpy
import pytest
import torch
from fillm_kernels import BackendError, backends, dispatch, factored_sketch
from fillm_kernels.factored_sketch import _reference
from fillm_kernels.sides import SIDES, projection_rows, tensorsketch_side
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ragged import assert_within, magnitudes, ragged, triton_device

kernels = pytest.importorskip("fillm_kernels.triton.factored_sketch")
projection = pytest.importorskip("fillm_kernels.triton.projection")
folding = pytest.importorskip("fillm_kernels.triton.tensorsketch")

DEVICE = triton_device()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAPS = (("factored", (5, 40)), ("factored-sjlt", (16, 6)), ("tensorsketch", (24,)))
U = 2.0**-24  # float32: products of bfloat16 and float16 numbers and of their parts are exact in it


def bound(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    # Each row is sketched to within some 64 roundings of its size (at most 1100 random terms), where the size of a
    # sketch is at most sqrt(n) times that of the row if all of it meets in few bins; then 64 more in the product or the
    # transform, of sum_t |x_t| |dy_t|.
    return (128 * U * math.sqrt(max(x.shape[1], 1) * max(dy.shape[1], 1)) * magnitudes(x, dy, offsets))[:, None]


def run(x: Tensor, dy: Tensor, offsets: Tensor, dims: tuple[int, ...], kind: str, seed: int = 3) -> Tensor:
    return kernels.launch(x.to(DEVICE), dy.to(DEVICE), offsets, list(dims), kind, [seed]).cpu()


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])], ids=str)
@pytest.mark.parametrize(("kind", "dims"), MAPS)
def test_kernels_agree_with_gradients_sketched_in_float64(kind, dims, dtype):
    several = ([0, 1, 2, 5, 0, 63, 64, 65], 63, 65), ([140, 1, 0, 3], 64, 48), ([2, 0, 3], 1034, 7), ([5], 1, 1)
    for lengths, inputs, outputs in several:
        x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
        got = run(x, dy, offsets, dims, kind)
        assert got.shape == (len(lengths), math.prod(dims)) and got.dtype == torch.float32
        assert_within(got, _reference(x, dy, offsets, list(dims), kind, 3), bound(x, dy, offsets))
    for lengths, inputs in ([], 3), ([0, 0], 3), ([2, 1], 0):
        x, dy, offsets = ragged(lengths, inputs, 4, dtype)
        assert torch.equal(run(x, dy, offsets, dims, kind), torch.zeros(len(lengths), math.prod(dims)))


@pytest.mark.parametrize(
    ("kind", "dims"), [("factored", (3, 130)), ("factored-sjlt", (520, 8)), ("tensorsketch", (601,))]
)
def test_wide_sides(kind, dims):
    x, dy, offsets = ragged([3, 0, 4], 70, 33)
    want = _reference(x, dy, offsets, list(dims), kind, 3)
    assert_within(run(x, dy, offsets, dims, kind), want, bound(x, dy, offsets))


def test_projections_follow_the_seed_law():
    for kind, dim, nonzeros in ("gaussian", 40, 1), ("sjlt", 12, 4), ("sjlt", 7, 1):
        matrix = torch.full((1, 64, 64), torch.nan, device=DEVICE)
        projection.fill(matrix, dim, kind, 5, nonzeros, 3, 50, 0)
        want = torch.zeros(64, 64, dtype=torch.float64)
        scale = math.sqrt(dim if kind == "gaussian" else nonzeros)
        want[:47, :dim] = projection_rows(torch.arange(3, 50), dim, kind, 5, nonzeros) * scale
        # A logarithm, a root and a polynomial of float32, each off by a few roundings; entries are below 6.
        assert_within(matrix[0].cpu(), want, 6 * 16 * U if kind == "gaussian" else 1e-15)
        parts = torch.full((3, 64, 64), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        projection.fill(parts, dim, kind, 5, nonzeros, 3, 50, 0)
        assert torch.equal(parts.double().sum(0), matrix[0].double())


@pytest.mark.slow
def test_a_projection_made_in_pieces_gives_the_same_bits(monkeypatch):
    x, dy, offsets = ragged([3, 0, 4], 1034, 5, torch.bfloat16)
    for kind in ("factored", "factored-sjlt"):
        whole = run(x, dy, offsets, (6, 72), kind)
        with monkeypatch.context() as patched:
            patched.setattr(projection, "COLUMNS", 64)
            patched.setattr(projection, "MATRIX_ENTRIES", 1)
            assert torch.equal(run(x, dy, offsets, (6, 72), kind), whole)


def test_bins_and_signs_of_a_tensorsketch_follow_the_seed_law():
    for side, dim in (0, 24), (1, 1), (1, 1 << 20):
        codes, starts = folding.table(300, dim, 2**62 + 7, side, torch.device(DEVICE))
        bins, signs = tensorsketch_side(torch.arange(300), dim, 2**62 + 7, SIDES[side])
        coordinate = (codes >> 1 & 0xFFFFFFFF).cpu()
        assert torch.equal(bins.sort(stable=True).indices, coordinate)
        assert torch.equal(1 - 2 * (codes.cpu() & 1), signs[coordinate])
        assert torch.equal(starts.cpu().diff(), bins.bincount(minlength=dim))


@pytest.mark.parametrize(("kind", "dims"), MAPS)
def test_bits_of_a_sample_depend_on_nothing_but_its_rows(kind, dims, monkeypatch):
    # The interpreter multiplies by a library whose bits depend on where in a tile a row lies; matrix units do not.
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: (a[:, :, None] * b[None]).sum(1, dtype=dtype))
    x, dy, offsets = ragged([9, 0, 40, 3, 120], 33, 20)
    whole = run(x, dy, offsets, dims, kind)
    assert torch.equal(run(x, dy, offsets, dims, kind), whole)
    # Blocks of 50 rows: the last sample is cut, and in every call at the same rows of its own.
    monkeypatch.setattr(kernels, "BLOCK_ENTRIES", 50 * sum(dims))
    monkeypatch.setattr(kernels, "RUN", 16)
    monkeypatch.setattr(kernels, "SPECTRA_RUN", 16)
    together = run(x, dy, offsets, dims, kind)
    assert_within(together, whole.double(), bound(x, dy, offsets))
    for sample, (begin, end) in enumerate(pairwise(offsets.tolist())):
        alone = run(x[begin:end], dy[begin:end], torch.tensor([0, end - begin]), dims, kind)
        if kind == "tensorsketch":  # libraries do not promise the bits of a transform for another number of them
            assert_within(alone[0], together[sample].double(), bound(x, dy, offsets)[sample])
        else:
            assert torch.equal(alone[0], together[sample])


def test_memory_that_was_never_written_does_not_reach_the_result(monkeypatch):
    empty = torch.empty

    def poisoned(*size: int, **options: object) -> Tensor:
        return empty(*size, **options).fill_(-1 << 62 if options.get("dtype") == torch.int64 else torch.nan)

    x, dy, offsets = ragged([70, 0, 33, 130], 37, 41)
    wants = [_reference(x, dy, offsets, list(dims), kind, 3) for kind, dims in MAPS]
    monkeypatch.setattr(torch, "empty", poisoned)
    for (kind, dims), want in zip(MAPS, wants, strict=True):
        assert_within(run(x, dy, offsets, dims, kind), want, bound(x, dy, offsets))


def test_strided_inputs_are_read_as_they_are_and_left_unchanged():
    wide, tall, offsets = torch.randn(30, 90), torch.randn(33, 60), torch.tensor([0, 11, 11, 30])
    for x, dy in [(wide[:, 7:50], wide[:, 50:]), (wide[:, ::3], tall.T[:30]), (wide[:1].expand(30, 90), wide[:, :5])]:
        before = x.clone(), dy.clone()
        for kind, dims in MAPS:
            want = _reference(*before, offsets, list(dims), kind, 3)
            assert_within(run(x, dy, offsets, dims, kind), want, bound(x, dy, offsets))
        assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize(("kind", "dims"), MAPS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_sample(kind, dims, value):
    x, dy, offsets = ragged([9, 4, 30], 33, 20)
    dy[10], x[10, 3] = 1, value
    assert run(x, dy, offsets, dims, kind).isfinite().all(1).tolist() == [True, False, True]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 40))
def test_runs_cover_every_row_once_and_each_has_one_sample(lengths, step, run_rows):
    bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
    blocks, pieces, segments = kernels.plan(bounds, step, run_rows)
    covered = [[] for _ in lengths]
    for block in blocks:
        assert block.rows.stop - block.rows.start <= step
        own, firsts = pieces[block.pieces].tolist(), segments[block.segments].tolist()
        assert firsts[0] == 0 and firsts[-1] == len(own)
        for sample, (first, last) in zip(range(*block.samples.indices(len(lengths))), pairwise(firsts), strict=True):
            assert last > first
            for begin, end in own[first:last]:
                assert end - begin <= run_rows
                covered[sample] += range(block.rows.start + begin, block.rows.start + end)
    assert covered == [list(range(begin, end)) for begin, end in pairwise(bounds)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_launched_is_what_the_compile_check_compiles(dtype, monkeypatch):
    record, modules = [], (projection, folding, kernels)
    for module in modules:
        launch = module.launch_kernel

        def spy(kernel, programs, configuration, *arguments, launch=launch, **constants):
            record.append((kernel, configuration, {k: v for k, v in constants.items() if k not in ("WIDEN", "PLANES")}))
            launch(kernel, programs, configuration, *arguments, **constants)

        monkeypatch.setattr(module, "launch_kernel", spy)
    for width in (32, 33):
        x, dy, offsets = ragged([7, 3], width, 48, dtype)
        for kind, dims in (*MAPS, ("factored", (80, 20)), ("factored-sjlt", (80, 20)), ("tensorsketch", (3,))):
            run(x, dy, offsets, dims, kind)
    cases = [
        (case.kernel, case.configuration, {k: v for k, v in case.constants.items() if k not in ("WIDEN", "PLANES")})
        for module in modules
        for case in module.compile_cases()
    ]
    assert len({kernel.__name__ for kernel, _, _ in record}) == 6
    assert all(one in cases for one in record)


def test_the_op_runs_on_triton_and_leaves_float64_to_the_next_backend(monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    x, dy, offsets = ragged([3, 0, 5], 6, 7)
    got = factored_sketch(x.to(DEVICE), dy.to(DEVICE), offsets, 4)
    assert torch.equal(got.cpu(), run(x, dy, offsets, (4, 4), "factored", 0))
    arguments = (x.to(DEVICE), dy.to(DEVICE), offsets, [4, 4], "factored-sjlt", [3])
    torch.library.opcheck(torch.ops.fillm_kernels.factored_sketch.default, arguments)
    with pytest.raises(BackendError, match="asked for float64"):
        factored_sketch(x.double().to(DEVICE), dy.double().to(DEVICE), offsets, 4)
    monkeypatch.delenv("FILLM_BACKEND")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    table = dispatch._registry["factored_sketch"]
    assert dispatch.select("factored_sketch", "cuda", torch.float64) is table["torch"].run
    assert backends()["factored_sketch"]["used"]["cuda"] == "triton"
