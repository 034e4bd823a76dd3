"""The seed law: golden vectors, and the same bins and signs from every implementation."""

import pytest
import torch
from fillm_kernels import ShapeError, native, sketch
from fillm_kernels.seed_law import (
    ANGLE,
    KINDS,
    SIGN,
    START,
    BlockMap,
    below,
    cell,
    keys,
    mix,
    negative,
    normal,
    tensor_seed,
)
from fillm_kernels.sketch import _cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

BACKENDS = ("cpu", "torch", "triton", "reference")
FAR = (0, 1, 4095, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 12345, 2**61 + 99)


def test_golden_words():
    # docs/seed-law.md; a change of any of these changes every sketch ever stored.
    assert [mix(word) for word in (0, 1, 0xFFFFFFFF)] == [0, 0x688990C0, 0x6768824A]
    assert keys(0, "oporp", START) == (0x29DCEA06, 0x42F99747)
    assert keys(2**63 - 1, "sjlt", SIGN, 3) == (0x9F4D674E, 0xCE46F24F)
    assert keys(12345, "gaussian", ANGLE) == (0x57C8B59B, 0xC63C0F8A)
    key = keys(12345, "oporp", SIGN)
    pairs = {(0, 0): 0x186A5A57, (1, 0): 0x28F99077, (0, 1): 0x8393F15D, (2**32, 0): 0xAD23D10C}
    assert {pair: cell(key, *pair) for pair in pairs} == pairs
    assert cell(key, 2**62 + 7, 2**32 - 1) == 0x8F95341D
    assert tensor_seed(0, "") == 2410759840335264633
    assert tensor_seed(42, "model.layers.0.mlp.down_proj.weight") == 2725878163574549791


def test_golden_bins_and_signs():
    coordinate = torch.tensor([0, 1, 4095, 4096, 2**31, 2**32 + 1, 2**40 + 12345, 2**61 + 99])
    for kind, dim, chunk, bins, signs in (
        ("oporp", 4096, 0, [921, 922, 920, 1604, 3438, 3011, 1451, 4006], [1, 0, 1, 1, 0, 1, 0, 0]),
        ("countsketch", 4096, 0, [264, 265, 1602, 2862, 386, 2538, 4041, 2831], [0, 1, 0, 0, 0, 1, 0, 0]),
        ("sjlt", 1000, 1, [457, 458, 333, 334, 265, 291, 451, 473], [1, 0, 1, 1, 0, 1, 1, 1]),
    ):
        got = BlockMap.of(kind, 7, dim, 4).place(coordinate, chunk)
        assert [part.tolist() for part in got] == [bins, signs]
    entries = normal(7, "gaussian", torch.tensor([0, 2**32 + 1])[:, None], torch.arange(3))
    want = [[1.0582776110407215, -0.48293563992597976, 0.7346832137], [0.0684844629, -0.9934366817, -0.7497469488]]
    torch.testing.assert_close(entries, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_integers_and_tensors_give_the_same_words(seed, index, column, kind):
    key = keys(seed, kind, SIGN, 5)
    word = cell(key, index, column)
    assert cell(key, torch.tensor(index), torch.tensor(column)).item() == word
    assert negative(key, torch.tensor([index]), torch.tensor(column)).item() == negative(key, index, column)
    assert 0 <= word < 2**32
    assert 0 <= below(word, 1000) < 1000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "dim"), [("oporp", 60), ("countsketch", 260), ("sjlt", 100), ("rademacher", 70)])
def test_bins_and_signs_are_the_same_to_the_bit_everywhere(backend, kind, dim, monkeypatch):
    # The sketch of a unit vector is a column of the map. A single coordinate needs no memory, so any index will do.
    monkeypatch.setenv("FILLM_BACKEND", backend)
    seed, one = 2**62 + 2**31 + 5, torch.ones(1, 1, dtype=torch.float64 if backend == "torch" else torch.float32)
    for index in FAR:
        column = sketch(one, dim, kind, seed, offset=index)[0].sign().to(torch.int64)
        want = torch.zeros(dim, dtype=torch.int64)
        if kind == "rademacher":
            want = 1 - 2 * negative(keys(seed, kind, SIGN), index, torch.arange(dim))
        else:
            law = BlockMap.of(kind, seed, dim, 4)
            for chunk in range(law.chunks):
                bins, signs = law.place(torch.tensor([index]), chunk)
                want[bins] = 1 - 2 * signs
        assert torch.equal(column, want), index


@pytest.mark.parametrize("backend", BACKENDS)
def test_gaussian_entries_agree_within_rounding(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for index in FAR:
        got = sketch(torch.ones(1, 1), 70, "gaussian", 11, offset=index)[0].double()
        want = normal(11, "gaussian", torch.tensor(index), torch.arange(70)) / 70**0.5
        # A float32 logarithm and cosine of exact arguments, six further roundings, and |entry| < 6 / sqrt(70). Near its
        # zeros a cosine is wrong by an ulp of its argument, at most 2 pi 2^-24, rather than of itself.
        assert float((got - want).abs().max()) < 16 * 2.0**-24


def test_words_are_balanced_and_neighbours_independent():
    key = keys(3, "oporp", SIGN)
    words = cell(key, torch.arange(512)[:, None], torch.arange(512))
    bits = ((words[..., None] >> torch.arange(32)) & 1).double() * 2 - 1  # [index, column, bit]
    # A mean of n = 2^18 - 2^9 or more independent signs is beyond 5.5 / sqrt(n) once in 2.6e7.
    limit = 5.5 / (2**18 - 2**9) ** 0.5
    assert float(bits.mean((0, 1)).abs().max()) < limit
    assert float((bits[1:] * bits[:-1]).mean((0, 1)).abs().max()) < limit
    assert float((bits[:, 1:] * bits[:, :-1]).mean((0, 1)).abs().max()) < limit
    assert float((bits[..., 1:] * bits[..., :-1]).mean((0, 1)).abs().max()) < limit


def test_bins_are_uniform_and_meet_as_often_as_they_should():
    law = BlockMap.of("oporp", 1, 64, 4)
    starts = law.starts(torch.arange(1 << 16), 0)
    counts = starts.bincount(minlength=64).double()
    # Chi-square with 63 degrees of freedom: mean 63, deviation 11.2; 130 is beyond 5.9 deviations.
    assert float(((counts - 1024) ** 2 / 1024).sum()) < 130
    meetings = (starts[1:] == starts[:-1]).double().mean()
    assert abs(float(meetings) - 1 / 64) < 5.5 * (1 / 64 / 65535) ** 0.5


def test_normal_entries_have_the_moments_of_a_normal_law():
    entries = normal(5, "gaussian", torch.arange(1000)[:, None], torch.arange(200))
    count = entries.numel()
    # Deviations of the sample moments of n normal numbers: 1, sqrt(2), sqrt(15) and sqrt(96) over sqrt(n).
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((entries**power).mean()) - moment) < 5.5 * (spread / count) ** 0.5
    assert abs(float((entries[:, ::2] * entries[:, 1::2]).mean())) < 5.5 * (2 / count) ** 0.5


def test_seeds_of_tensors_differ_and_stay_in_range():
    names = [f"layers.{layer}.{name}" for layer in range(200) for name in ("a", "b", "ab", "a\0", "")]
    seeds = {tensor_seed(seed, name) for seed in (0, 1, 2**63 - 1) for name in names}
    assert len(seeds) == 3 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def tile_bins(tile: Tensor, row: int, column: int, inputs: int, law: BlockMap, instruction_set: str) -> Tensor:
    bins = torch.zeros(law.chunks * law.chunk_dim, dtype=tile.dtype)
    native.extension.sketch_tile(
        values=tile.data_ptr(),
        stride=tile.stride(0),
        rows=tile.shape[0],
        columns=tile.shape[1],
        row=row,
        column=column,
        inputs=inputs,
        bins=bins.data_ptr(),
        seed=law.seed,
        kind=KINDS.index(law.kind),
        chunks=law.chunks,
        ranges=law.ranges,
        width=law.width,
        dtype=native.DTYPE_CODES[str(tile.dtype).removeprefix("torch.")],
        instruction_set=instruction_set,
    )
    return bins * law.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "dim"), [("oporp", 61), ("oporp", 1024), ("countsketch", 1024), ("sjlt", 64)])
def test_tiles_of_a_gradient_add_up_to_its_sketch(kind, dim, dtype):
    # Small integers, so that sums are exact in any order (the scale of sjlt, 1/2, is too).
    gradient = torch.randint(-9, 10, (37, 700), dtype=dtype)
    law = BlockMap.of(kind, 9, dim, 4)
    want = _cpu(gradient.view(1, -1), dim, kind, 9, 4, 0)[0]
    for instruction_set in native.instruction_sets():
        total = torch.zeros(dim, dtype=dtype)
        for rows in (slice(0, 16), slice(16, 37)):
            for columns in (slice(0, 5), slice(5, 600), slice(600, 700)):
                tile = gradient[rows, columns]
                total += tile_bins(tile, rows.start, columns.start, 700, law, instruction_set)
        assert torch.equal(total, want)


def test_a_map_that_does_not_divide_is_refused():
    with pytest.raises(ShapeError, match="dim = 10 must be a multiple of nonzeros = 4"):
        BlockMap.of("sjlt", 0, 10, 4)
    with pytest.raises(ShapeError, match="nonzeros = 0"):
        BlockMap.of("sjlt", 0, 10, 0)
