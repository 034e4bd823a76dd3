"""Rows of the maps of `factored_sketch`, and rows sketched by them, beside matrices from docs/seed-law.md."""

import math

import pytest
import torch
from fillm_kernels import DtypeError, ShapeError, factored_sketch, side_rows, side_sketch, tensorsketch_side
from torch import Tensor

from tests.kernels import law
from tests.kernels.ragged import DTYPES, assert_within, precision

SEED = 2**61 + 9
COORDINATES = torch.tensor([0, 3, 3, 40, 31, 32, 1])


def side_matrix(kind: str, side: str, k: int, width: int) -> Tensor:
    nonzeros = next(n for n in (4, 2, 1) if k % n == 0)
    sketch = {"factored": "gaussian", "factored-sjlt": "sjlt"}[kind]
    return law.projection(sketch, law.tensor_seed(SEED, side), k, width, nonzeros=nonzeros)


@pytest.mark.parametrize("kind", ["factored", "factored-sjlt"])
@pytest.mark.parametrize(("side", "k"), [("out", 6), ("in", 9)])
def test_rows_of_a_side_are_those_of_its_matrix(kind, side, k):
    matrix = side_matrix(kind, side, k, 41)
    for dtype in (torch.float32, torch.float64):
        got = side_rows(COORDINATES, side, (6, 9), kind, SEED, dtype=dtype)
        assert got.dtype == dtype
        # Entries are made in float64; one rounding to float32 of numbers up to 6 / sqrt(6).
        assert_within(got, matrix[COORDINATES], 2.5 * (2.0**-24 if dtype == torch.float32 else 2.0**-48))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["factored", "factored-sjlt"])
def test_rows_are_sketched_by_their_sides_matrix(kind, dtype):
    rows = torch.randn(5, 41).to(dtype)
    for side, k in (("out", 6), ("in", 9)):
        got, want = side_sketch(rows, side, (6, 9), kind, SEED), rows.double() @ side_matrix(kind, side, k, 41)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # Sums of 41 products of entries up to 4 by weights up to 2.5.
        assert_within(got, want, 41 * 41 * 10 * precision(dtype))


def test_a_one_hot_side_may_be_left_out():
    # An embedding's gradient: row ids_t receives x_t.
    ids, x, offsets = torch.tensor([5, 0, 5, 7, 2]), torch.randn(5, 20, dtype=torch.float64), torch.tensor([0, 5])
    one_hot = torch.eye(9, dtype=torch.float64)[ids]
    for kind in ("factored", "factored-sjlt"):
        want = factored_sketch(x, one_hot, offsets, (4, 8), kind, SEED)
        rows = side_rows(ids, "out", (4, 8), kind, SEED, dtype=torch.float64)
        got = rows.T @ side_sketch(x, "in", (4, 8), kind, SEED)
        assert_within(got.flatten(), want[0], 1e-12)


@pytest.mark.parametrize("dim", [1, 7, 64, 1 << 20])
def test_bins_and_signs_of_a_tensorsketch_are_those_of_the_law(dim):
    index = COORDINATES.numpy().astype("uint64")
    for number, side in enumerate(("out", "in")):
        bins, signs = tensorsketch_side(COORDINATES, dim, SEED, side)
        start = law.cell(law.keys(SEED, "tensorsketch", law.START, number), index, law.u64(0))
        want = start * law.u64(dim) >> law.u64(32)
        minus = law.negative(law.keys(SEED, "tensorsketch", law.SIGN, number), index, law.u64(0))
        assert bins.tolist() == want.astype(int).tolist()
        assert signs.tolist() == [1 - 2 * int(bit) for bit in minus]
        if dim <= 64:
            rows = side_rows(COORDINATES, side, dim, "tensorsketch", SEED)
            assert torch.equal(rows[torch.arange(7), bins], signs.float())
            assert int(rows.count_nonzero()) == 7


def test_coordinates_beyond_32_bits():
    far = torch.tensor([2**40 + 7])
    got = side_rows(far, "out", (8, 8), "factored-sjlt", SEED)
    want = law.projection("sjlt", law.tensor_seed(SEED, "out"), 8, 1, offset=2**40 + 7, nonzeros=4)
    assert_within(got, want, 0.0)
    assert math.isclose(float(got.square().sum()), 1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: side_rows(COORDINATES, "left", 4), "side must be 'out'"),
        (lambda: side_rows(COORDINATES, "out", 4, "best"), "kind must be one of factored"),
        (lambda: side_rows(COORDINATES, "out", (4, 4, 4)), "dims must be"),
        (lambda: side_rows(COORDINATES, "out", 0), "at least 1"),
        (lambda: side_rows(COORDINATES, "out", 4, seed=-1), "seed must be"),
        (lambda: side_sketch(torch.ones(2, 3), "out", 4, "tensorsketch"), "see tensorsketch_side"),
        (lambda: side_sketch(torch.ones(3), "out", 4), "must be .B, P."),
        (lambda: tensorsketch_side(COORDINATES, 4, 0, "x"), "side must be"),
    ],
)
def test_what_is_no_side_is_refused(call, words):
    with pytest.raises(ShapeError, match=words):
        call()


def test_coordinates_are_whole_numbers():
    with pytest.raises(DtypeError, match="coordinates must be"):
        side_rows(torch.ones(3), "out", 4)
