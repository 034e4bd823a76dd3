import importlib
import math
from itertools import pairwise

import pytest
import torch
from fillm_kernels import BackendError, DeviceError, DtypeError, ShapeError, native, sketch
from fillm_kernels.seed_law import BlockMap
from fillm_kernels.sketch import SKETCHES, _cpu, _reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.law import projection
from tests.kernels.ragged import DTYPES, assert_within, precision

BACKENDS = ("cpu", "torch", "triton", "cuda", "reference")  # cuda: on the CPU, tests/kernels/cuda_host.py
SPARSE = ("oporp", "countsketch", "sjlt")
# (B, P, dim): bins on both sides of block and vector widths, primes, fewer coordinates than bins, none at all.
SHAPES = ((1, 1, 1), (3, 63, 64), (2, 65, 64), (5, 1009, 37), (2, 300, 1028), (1, 4099, 256), (2, 0, 8), (0, 9, 8))
module = importlib.import_module("fillm_kernels.sketch")
PAIRS = [(b, k) for b in BACKENDS for k in SKETCHES if b != "cuda" or k not in module.DENSE]


def dimension(kind: str, dim: int) -> int:
    return -(-dim // 4) * 4 if kind == "sjlt" else dim


def bound(g: Tensor, dim: int, kind: str, offset: int = 0) -> Tensor:
    # A sum of n terms is off by at most n u sum |terms|, by some sqrt(n) u of it on random data; what lands in a bin is
    # the absolute sketch. Dense kinds add rounded entries below 6: 16 roundings more for a Gaussian one.
    terms = g.shape[1] if kind in module.DENSE else -(-g.shape[1] // max(1, dim // 4)) + 2
    size = g.double().abs().sum(1, keepdim=True) * (6 / math.sqrt(dim) if kind in module.DENSE else 1)
    if kind not in module.DENSE:
        size = largest_bin(g, dim, kind, offset)
    return precision(g.dtype) * (4 * math.sqrt(terms) + 32) * size + 1e-300


def largest_bin(g: Tensor, dim: int, kind: str, offset: int) -> Tensor:
    """sum |g| over what meets in the fullest bin of each row, [B, 1]."""
    law = BlockMap.of(kind, 7, dim, 4)
    filled = torch.zeros(g.shape[0], dim, dtype=torch.float64)
    for chunk in range(law.chunks):
        filled.index_add_(1, law.place(offset + torch.arange(g.shape[1]), chunk)[0], g.double().abs())
    return filled.amax(1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "kind"), PAIRS)
def test_every_backend_agrees_with_the_definition_in_float64(backend, kind, dtype, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for samples, count, dim in SHAPES:
        if backend == "triton" and samples * count * dim > 30_000 and (kind, dtype) != ("oporp", torch.float32):
            continue  # the interpreter runs every program one after the other
        dim = dimension(kind, dim)
        g = torch.randn(samples, count).to(dtype)
        for offset in (0, 2**33 + 11)[backend == "triton" :]:
            got = sketch(g, dim, kind, 7, offset=offset)
            assert got.shape == (samples, dim)
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_within(got, _reference(g, dim, kind, 7, 4, offset), bound(g, dim, kind, offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_instruction_set_of_this_processor(instruction_set, kind, dtype):
    for samples, count, dim in SHAPES:
        dim = dimension(kind, dim)
        g = torch.randn(samples, count).to(dtype)
        want = _reference(g, dim, kind, 7, 4, 5)
        assert_within(_cpu(g, dim, kind, 7, 4, 5, instruction_set), want, bound(g, dim, kind, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_many_rows_in_few_bins_have_the_bits_of_single_rows(instruction_set, dtype):
    # Sixteen rows and runs under 16 bins are sketched with rows in the lanes.
    for kind, dim, nonzeros in (("sjlt", 16, 4), ("sjlt", 7, 1), ("sjlt", 24, 24), ("oporp", 12, 4)):
        for count, offset in ((1, 0), (100, 3), (1500, 2**40 + 77)):
            g = torch.randn(37, count).to(dtype)
            together = _cpu(g, dim, kind, 9, nonzeros, offset, instruction_set)
            alone = [_cpu(row, dim, kind, 9, nonzeros, offset, instruction_set) for row in g.split(1)]
            assert torch.equal(together, torch.cat(alone))
            want = _reference(g, dim, kind, 9, nonzeros, offset)
            # No bin holds more than the whole row: at most 1500 terms, 64 roundings of their sum.
            assert_within(together, want, 64 * precision(dtype) * g.double().abs().sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", module.DENSE)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_dense_kinds_of_many_rows_have_the_bits_of_single_rows(instruction_set, kind, dtype):
    # Over 256 rows, two panels of 64 columns and two pieces of 4096 coordinates, none of them full; for fewer rows,
    # every way to cut them into blocks of 8, 4, 2 and 1.
    for samples, count, dim, offset in ((261, 70, 67, 4060), (15, 130, 65, 2**40 + 31), (3, 4200, 2, 9)):
        g = torch.randn(samples, count).to(dtype)
        together = _cpu(g, dim, kind, 9, 4, offset, instruction_set)
        some = range(0, samples, 1 + samples // 9)
        alone = [_cpu(g[row : row + 1], dim, kind, 9, 4, offset, instruction_set) for row in some]
        assert torch.equal(together[list(some)], torch.cat(alone))
        assert_within(together, _reference(g, dim, kind, 9, 4, offset), bound(g, dim, kind))


# Pairs (offset, rows that have it), P, dim: a run longer than any block of rows, pieces and tiles cut at both ends, an
# offset that comes back, one beyond 32 bits, no rows, no columns.
PLACES = (
    (((4060, 1), (0, 2), (4060, 18), (2**33 + 11, 1)), 70, 67),
    (((5, 300), (6, 1)), 9, 3),
    (((4095, 1), (8191, 2)), 4200, 2),
    ((), 8, 4),
    (((3, 2), (1, 1)), 0, 4),
)


def at_places(places: tuple, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([first for first, rows in places for _ in range(rows)], dtype=torch.int64)
    return torch.randn(offsets.numel(), count).to(dtype), offsets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", module.DENSE)
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton", "reference"])
def test_rows_of_dense_kinds_may_have_places_of_their_own(backend, kind, dtype, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for places, count, dim in PLACES:
        g, offsets = at_places(places, count, dtype)
        if backend == "triton" and g.numel() > 2000:
            continue  # the interpreter runs every program one after the other
        before = g.clone(), offsets.clone()
        got = sketch(g, dim, kind, 7, offset=offsets)
        assert torch.equal(g, before[0]) and torch.equal(offsets, before[1])
        maps = {first: projection(kind, 7, dim, count, offset=first) for first, _ in places}
        rows = [row.double() @ maps[first] for row, first in zip(g, offsets.tolist(), strict=True)]
        want = torch.stack(rows) if rows else torch.zeros(0, dim, dtype=torch.float64)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_within(got, want, bound(g, dim, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", module.DENSE)
@pytest.mark.parametrize("backend", [*native.instruction_sets(), "torch"])
def test_a_row_at_a_place_of_its_own_has_the_bits_of_a_call_of_its_own(backend, kind, dtype):
    def run(g: Tensor, dim: int, offset: int | Tensor) -> Tensor:
        given = (g, dim, kind, 9, 4, offset)
        return module._torch(*given) if backend == "torch" else _cpu(*given, backend)

    for places, count, dim in PLACES[:3]:
        g, offsets = at_places(places, count, dtype)
        some = range(0, len(g), 1 + len(g) // 9)
        alone = torch.cat([run(g[row : row + 1], dim, int(offsets[row])) for row in some])
        assert torch.equal(run(g, dim, offsets)[list(some)], alone)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_rows_at_places_of_any_strides_and_in_parts(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 1000)
    g, offsets = torch.randn(90, 7).T, torch.tensor([40, 3, 40, 40, 9, 9, 0, 1])[1:]
    for kind in module.DENSE:
        assert_within(
            sketch(g, 24, kind, 7, offset=offsets), _reference(g, 24, kind, 7, 4, offsets), 2 * bound(g, 24, kind)
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 140), st.integers(0, 2**50), st.integers(0, 2**62))
def test_a_rademacher_sketch_keeps_integers_exact(samples, count, dim, offset, seed):
    g = torch.randint(-8, 9, (samples, count), dtype=torch.float64)
    got = (_cpu(g, dim, "rademacher", seed, 4, offset) * math.sqrt(dim)).round()
    want = projection("rademacher", seed, dim, count, offset=offset) * math.sqrt(dim)
    assert torch.equal(got, g @ want.round())


def cases(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Pairs (x, y) [C, O I] that a careless map fails on: rank-one gradients among them."""
    generator = torch.Generator().manual_seed(1)
    dy, x = torch.randn(2, outputs, generator=generator), torch.randn(2, inputs, generator=generator)
    rank_one = torch.einsum("bo,bi->boi", dy, x)
    column, row, heavy, ramp = torch.zeros(4, outputs, inputs)
    column[:, 3] = dy[0]
    row[1] = x[0]
    heavy[0, 0], heavy[-1, -1] = 10, 7
    ramp[:] = torch.arange(inputs) % 5.0
    same_block = torch.zeros(2, outputs, inputs)
    same_block[0, 0, :8], same_block[1, 0, 8:16] = 1, 1
    ones = torch.ones(outputs, inputs)
    low_rank = torch.einsum("o,i->oi", dy[0], torch.ones(inputs))
    pairs = [
        (rank_one[0], rank_one[0]), (rank_one[0], rank_one[1]), (column, column), (row, row), (column, row),
        (ones, ones), (ones, ramp), (heavy, heavy), (heavy, ones), (same_block[0], same_block[1]),
        (low_rank, low_rank), (low_rank, rank_one[0]), (ramp, rank_one[1]),
    ]  # fmt: skip
    left, right = (torch.stack([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    return left.double(), right.double()


def moments(kind: str, dim: int, x: Tensor, y: Tensor, seeds: int) -> tuple[Tensor, Tensor]:
    """Mean error and mean squared error of <S x, S y> over seeds, in units of the bound's deviation and variance."""
    exact = (x * y).sum(1)
    variance = (x.square().sum(1) * y.square().sum(1) + exact.square()) / dim
    both = torch.cat([x, y])
    errors = []
    for seed in range(seeds):
        s, t = _cpu(both, dim, kind, seed, 4, 0).chunk(2)
        errors.append((s * t).sum(1) - exact)
    errors = torch.stack(errors)
    return errors.mean(0) / variance.sqrt(), errors.square().mean(0) / variance


@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (40, 100), (16, 256)])
@pytest.mark.parametrize("kind", SPARSE)
def test_inner_products_are_unbiased_and_vary_no_more_than_the_bound(kind, outputs, inputs):
    seeds, x, y = 500, *cases(outputs, inputs)
    mean, square = moments(kind, 64, x, y, seeds)
    # The mean of n draws deviates by at most 1 / sqrt(n). Their mean square deviates from the variance by the factor
    # sqrt((kappa - 1) / n): 0.1 for a kurtosis of 6. A map off by the factor 2 fails.
    assert float(mean.abs().max()) < 4.5 / math.sqrt(seeds)
    assert float(square.max()) < 1.5


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_dense_kinds_are_unbiased_and_vary_no_more_than_the_bound(kind):
    seeds, x, y = 300, *cases(8, 32)
    mean, square = moments(kind, 16, x, y, seeds)
    assert float(mean.abs().max()) < 4.5 / math.sqrt(seeds)
    assert float(square.max()) < 1.6


def test_the_variance_test_finds_a_map_that_is_no_sketch(monkeypatch):
    x, y = cases(48, 64)
    monkeypatch.setattr(BlockMap, "starts", lambda self, block, chunk: 0 * block)  # every row falls on the same bins
    monkeypatch.setitem(moments.__globals__, "_cpu", _reference)
    _, square = moments("oporp", 64, x, y, 60)
    assert float(square.max()) > 3


@pytest.mark.parametrize(("backend", "kind"), PAIRS)
def test_sketches_of_pieces_add_up_to_the_sketch_of_the_whole(backend, kind, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    g, dim = torch.randn(1, 400), 40
    whole, cuts = sketch(g, dim, kind, 7, total=400), (0, 7, 8, 300, 400)
    parts = sum(sketch(g[:, a:b], dim, kind, 7, offset=a, total=400) for a, b in pairwise(cuts))
    assert_within(parts, whole.double(), 4 * bound(g, dim, kind))


@pytest.mark.parametrize(("backend", "kind"), PAIRS)
def test_bits_do_not_depend_on_the_split_of_the_batch(backend, kind, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    g = torch.randn(19, 700 if backend != "triton" else 90)
    together = sketch(g, 20, kind, 3)
    cuts = [1, 17, 1]
    if kind in module.DENSE and backend == "triton":
        cuts = [16, 3]  # the interpreter's product, numpy's, rounds row 1 of a tile unlike row 0
    if backend != "reference":  # float64, one product for all: rounding is its own
        assert torch.equal(torch.cat([sketch(part, 20, kind, 3) for part in g.split(cuts)]), together)
    assert torch.equal(sketch(g, 20, kind, 3), together)


@pytest.mark.parametrize("kind", SKETCHES)
def test_bits_depend_neither_on_threads_nor_on_memory_that_was_never_written(kind, monkeypatch):
    g, before, results = torch.randn(3, 30_000 if kind in module.DENSE else 200_000), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_cpu(g, 260, kind, 3, 4, 77))
            _cpu(torch.full_like(g, torch.nan), 260, kind, 3, 4, 77)  # the scratch memory, kept between calls
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(size, torch.nan, **options))
    results.append(_cpu(g, 260, kind, 3, 4, 77))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("backend", "kind"), [pair for pair in PAIRS if pair[0] in ("triton", "cuda")])
def test_gpu_kernels_overwrite_the_memory_they_are_given(backend, kind, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    g = torch.randn(2, 120)
    want = sketch(g, 36, kind, 3)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    assert torch.equal(sketch(g, 36, kind, 3), want)


@pytest.mark.parametrize(("backend", "kind"), PAIRS)
def test_strided_inputs_are_read_as_they_are_and_left_unchanged(backend, kind, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    wide = torch.randn(4, 300)
    for g in (wide[:, 7:240], wide[::2, ::3], wide.T[:5], wide[:1].expand(2, 300)):
        before = g.clone()
        got = sketch(g, 24, kind, 7, offset=3)
        assert_within(got, _reference(before, 24, kind, 7, 4, 3), 2 * bound(before, 24, kind, 3))
        assert torch.equal(g, before)


@pytest.mark.parametrize("backend", ("cpu", "torch"))
def test_long_inputs_are_taken_in_parts(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 1000)
    g = torch.randn(900, 3).T
    for kind in SKETCHES:
        assert_within(sketch(g, 24, kind, 7), _reference(g, 24, kind, 7, 4, 0), 2 * bound(g, 24, kind))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPARSE)
def test_nan_and_infinity_reach_their_own_bins_alone(backend, kind, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    g = torch.randn(3, 150)
    g[0, 100], g[2, 149] = torch.nan, torch.inf
    bad = ~sketch(g, 40, kind, 5).isfinite()
    assert bad.sum(1).tolist() == ([4, 0, 4] if kind == "sjlt" else [1, 0, 1])


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SPARSE), st.integers(1, 3000), st.integers(1, 90), st.integers(0, 2**50), st.integers(0, 2**62))
def test_a_sparse_sketch_keeps_integers_exact_and_every_coordinate_once(kind, count, dim, offset, seed):
    dim = dimension(kind, dim)
    g = torch.randint(-8, 9, (2, count), dtype=torch.float32)
    got = sketch(g, dim, kind, seed, offset=offset, nonzeros=4)
    assert torch.equal(got.double(), _reference(g, dim, kind, seed, 4, offset))
    scale = 0.5 if kind == "sjlt" else 1.0
    parity = (got / scale).sum(1) - (4 if kind == "sjlt" else 1) * g.sum(1)
    assert torch.equal(parity % 2, torch.zeros(2))


def test_an_oporp_bin_takes_one_coordinate_of_every_block():
    bins = BlockMap.of("oporp", 3, 61, 4).place(torch.arange(61 * 9), 0)[0].view(9, 61)
    assert torch.equal(bins.sort(1).values, torch.arange(61).expand(9, 61))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.ones(3), 4), {}, ShapeError, r"g must be \[B, P\]; got \[3\]"),
        ((torch.ones(3, 3).int(), 4), {}, DtypeError, "g must be float32"),
        (([[1.0]], 4), {}, DtypeError, "g is a list"),
        ((torch.ones(3, 3), 0), {}, ShapeError, "dim must be in"),
        ((torch.ones(3, 3), 4, "best"), {}, ShapeError, "kind must be one of oporp"),
        ((torch.ones(3, 3), 4, "tensorsketch"), {}, ShapeError, "got 'tensorsketch'"),
        ((torch.ones(3, 3), 4, "oporp", -1), {}, ShapeError, r"seed must be in \[0, 2\^63\)"),
        ((torch.ones(3, 3), 4), {"offset": -1}, ShapeError, "offset must be"),
        ((torch.ones(3, 3), 4), {"offset": 2, "total": 4}, ShapeError, "ends beyond total = 4"),
        ((torch.ones(3, 3), 6, "sjlt"), {}, ShapeError, "multiple of nonzeros = 4"),
        (
            (torch.ones(3, 3), 4, "oporp"),
            {"offset": torch.arange(3)},
            ShapeError,
            "rademacher and gaussian only",
        ),
        (
            (torch.ones(3, 3), 4, "gaussian"),
            {"offset": torch.arange(2)},
            ShapeError,
            r"must be \[B\] = \[3\]",
        ),
        ((torch.ones(3, 3), 4, "gaussian"), {"offset": torch.ones(3)}, DtypeError, "must be int64; got torch.float32"),
        ((torch.ones(3, 3), 4, "gaussian"), {"offset": -torch.arange(3)}, ShapeError, "must be at least 0 .* got -2"),
        (
            (torch.ones(3, 3), 4, "gaussian"),
            {"offset": torch.tensor([1, 9, 2]), "total": 11},
            ShapeError,
            "a piece of 3 from offset 9 ends beyond total = 11",
        ),
        (
            (torch.ones(3, 3), 4, "gaussian"),
            {"offset": torch.ones(3, dtype=torch.int64, device="meta")},
            DeviceError,
            "must lie where g does",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, error, words):
    with pytest.raises(error, match=words):
        sketch(*arguments, **options)


def test_a_backend_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "vulkan")
    with pytest.raises(BackendError, match="sketch has no such backend"):
        sketch(torch.ones(1, 1), 4)


@pytest.mark.skipif(native.extension is None, reason="library products have an order of their own")
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bits_of_a_row_of_a_dense_kind_depend_on_nothing_else(dtype, kind, monkeypatch):
    """Narrow products of a library take another order for another place of a row, or another number of threads."""
    monkeypatch.setenv("FILLM_BACKEND", "cpu")
    g, before = torch.randn(20, 300).to(dtype), torch.get_num_threads()
    for dim in (1, 3, 5, 6, 60):
        whole = sketch(g, dim, kind, 5)
        try:
            for threads, size in ((1, 1), (2, 3), (3, 17), (7, 20)):
                torch.set_num_threads(threads)
                assert torch.equal(torch.cat([sketch(part, dim, kind, 5) for part in g.split(size)]), whole)
        finally:
            torch.set_num_threads(before)
