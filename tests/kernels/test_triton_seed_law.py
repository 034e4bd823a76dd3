"""The device function that fused kernels place a tile with."""

import pytest
import torch
from fillm_kernels.seed_law import KINDS, BlockMap

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from fillm_kernels.triton.seed_law import halves, place  # noqa: E402


@triton.jit
def place_tile(bins, signs, low, high, row, inputs, width, ranges, chunk, KIND: tl.constexpr):
    rows = row.to(tl.int64) + tl.arange(0, 8)
    columns = tl.arange(0, 16)
    at, sign = place(rows[:, None] * inputs + columns[None, :], low, high, width, ranges, KIND, chunk)
    slot = tl.arange(0, 8)[:, None] * 16 + columns[None, :]
    tl.store(bins + slot, at)
    tl.store(signs + slot, sign.to(tl.int32))


@pytest.mark.parametrize(("kind", "dim", "chunk"), [("oporp", 37, 0), ("countsketch", 512, 0), ("sjlt", 64, 2)])
def test_triton_places_a_tile_like_the_definition(kind, dim, chunk):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    law = BlockMap.of(kind, 2**50 + 3, dim, 4)
    bins, signs = torch.full((2, 8, 16), -1, dtype=torch.int32, device=device)
    row, inputs = 1 << 20, 9000  # flat indices beyond 2^32
    place_tile[(1,)](bins, signs, *halves(law.seed), row, inputs, law.width, law.ranges, chunk, KIND=KINDS.index(kind))
    want = law.place((row + torch.arange(8))[:, None] * inputs + torch.arange(16), chunk)
    assert torch.equal(bins.cpu().long() + chunk * law.chunk_dim, want[0])
    assert torch.equal(signs.cpu().long(), want[1])


def test_halves_are_signed_and_make_up_the_seed():
    for seed in (0, 2**31, 2**32 - 1, 2**63 - 1, 2**62 + 2**31):
        low, high = halves(seed)
        assert -(2**31) <= low < 2**31
        assert 0 <= high < 2**31
        assert high << 32 | low & 0xFFFFFFFF == seed
