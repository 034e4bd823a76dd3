import importlib
import itertools

import pytest
import torch
from fillm_kernels import DeviceError, DtypeError, ShapeError, dispatch, ghost_norm, native, sample_moments
from fillm_kernels.sample_moments import _cpu, _op
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.ragged import DTYPES, LENGTHS, WIDTHS, assert_within, gradients, magnitudes, precision, ragged

BACKENDS = ("cpu", "torch", "reference")


def inputs(lengths, width, dtype, seed=0):
    x, dy, offsets = ragged(lengths, *width, dtype, seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (width[1], width[0])
    return x, dy, offsets, *(torch.randn(shape, dtype=wide) for _ in range(3))


def check(x, dy, offsets, v, second, absolute, alpha, found, before):
    """Against float64 gradients formed outright.

    An entry of G_b is a sum of T_b products in precision u: off by at most (T_b + 2) u A, A the same sum of magnitudes
    (Higham 3.1). Squares, products and sums over a tile, a row or the samples add a few roundings of their own.
    """
    unit, formed = precision(x.dtype), gradients(x, dy, offsets)
    longest = max([int(n) for n in offsets.diff()], default=0)
    wide = gradients(x.abs(), dy.abs(), offsets)  # A, [B, O, I]
    off = (longest + 64) * unit
    assert_within(
        found.squared_norms, formed.square().sum((1, 2)), 3 * off * magnitudes(x, dy, offsets).square() + 1e-30
    )
    assert_within(found.row_squared_norms, formed.square().sum(2), 3 * off * wide.square().sum(2) + 1e-30)
    assert_within(
        found.dots, (formed * v.double()).sum((1, 2)), 2 * off * (wide * v.double().abs()).sum((1, 2)) + 1e-30
    )
    several = off + len(offsets) * unit
    squares, sums = formed.square().sum(0), formed.abs().sum(0)
    limit = 3 * several * (abs(alpha) * wide.square().sum(0) + before[0].double().abs())
    assert_within(second, before[0].double() + alpha * squares, limit)
    limit = 3 * several * (abs(alpha) * wide.sum(0) + before[1].double().abs())
    assert_within(absolute, before[1].double() + alpha * sums, limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("width", WIDTHS[:4], ids=str)
def test_every_backend_against_float64(monkeypatch, backend, dtype, lengths, width):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    x, dy, offsets, v, second, absolute = inputs(lengths, width, dtype)
    before, kept = (second.clone(), absolute.clone()), (x.clone(), dy.clone(), offsets.clone(), v.clone())
    found = sample_moments(x, dy, offsets, v, second, absolute, rows=True, alpha=0.5)
    check(x, dy, offsets, v, second, absolute, 0.5, found, before)
    assert found.squared_norms.dtype == second.dtype
    assert all(torch.equal(now, then) for now, then in zip((x, dy, offsets, v), kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths, width", [([0, 1, 63, 5, 130], (65, 40)), ([3] * 9, (64, 128)), ([0, 0], (16, 16))])
@pytest.mark.parametrize("asked", ["all", "norm"])
def test_triton_in_the_interpreter(monkeypatch, dtype, lengths, width, asked):
    if not dispatch.interpreted():
        pytest.skip("Triton runs compiled where there is a GPU")
    x, dy, offsets, v, second, absolute = inputs(lengths, width, dtype)
    whole = sample_moments(x, dy, offsets, v, one := second.clone(), two := absolute.clone(), rows=True, alpha=0.5)
    before = (second.clone(), absolute.clone())
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    if asked == "norm":  # nothing is summed over samples: they are dealt out to several groups of programs
        found = sample_moments(x, dy, offsets, rows=True)
        torch.testing.assert_close(found.squared_norms, whole.squared_norms, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.row_squared_norms, whole.row_squared_norms, rtol=1e-4, atol=1e-5)
        return
    found = sample_moments(x, dy, offsets, v, second, absolute, rows=True, alpha=0.5)
    check(x, dy, offsets, v, second, absolute, 0.5, found, before)
    torch.testing.assert_close(second, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(absolute, two, rtol=1e-4, atol=1e-5)
    wide = torch.zeros(width[0], width[1]).T  # a transposed accumulator
    sample_moments(x, dy, offsets, second=wide, alpha=0.5)
    torch.testing.assert_close(wide, second - before[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_cuts_long_samples_of_small_layers(monkeypatch, dtype):
    if not dispatch.interpreted():
        pytest.skip("Triton runs compiled where there is a GPU")
    steps = importlib.import_module("fillm_kernels.triton.steps")
    monkeypatch.setattr(steps, "plan", steps.plan.__wrapped__)  # no cache across the constants below
    monkeypatch.setattr(importlib.import_module("fillm_kernels.triton.sample_moments"), "plan", steps.plan)
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    x, dy, offsets, v, second, absolute = inputs([3, 230, 0, 51, 99, 50], (65, 40), dtype)
    whole = sample_moments(x, dy, offsets, v, rows=True, sketch_dim=64, seed=3)
    # Parts of 50 rows, or a quarter of the sample; five of them at a time, but for a sample that takes more.
    monkeypatch.setattr(steps, "FEW_TILES", ((6, 50),))
    monkeypatch.setattr(steps, "MOST_PARTS", 4)
    monkeypatch.setattr(steps, "PART_ENTRIES", 5 * 65 * 40)
    before = (second.clone(), absolute.clone())
    found = sample_moments(x, dy, offsets, v, second, absolute, rows=True, alpha=0.5, sketch_dim=64, seed=3)
    check(x, dy, offsets, v, second, absolute, 0.5, found, before)
    for cut, uncut in zip(found, whole, strict=True):
        torch.testing.assert_close(cut, uncut, rtol=1e-4, atol=1e-3)
    parts = x[3:233], dy[3:233], torch.tensor([0, 230]), v, second, absolute
    alone = sample_moments(*parts, rows=True, sketch_dim=64, seed=3)
    for one, together in zip(alone, found, strict=True):
        assert torch.equal(one[0], together[1])


@given(st.lists(st.integers(0, 5000), max_size=30), st.integers(1, 300), st.integers(1, 40))
def test_steps_and_parts_take_every_row_once_and_every_sample_ends_once(lengths, tiles, groups):
    steps = pytest.importorskip("fillm_kernels.triton.steps")
    bounds = tuple(itertools.accumulate([0, *lengths]))
    direct, starts = steps.plan(bounds, 32, groups, tiles)
    parts = [table for table in steps.plan_parts(bounds, tiles, 1 << 20)]
    rows = sorted((begin, end) for table in (direct, *parts) for begin, end, _ in table.tolist() if end > begin)
    assert [begin for begin, _ in rows] + [bounds[-1]] == [0, *(end for _, end in rows)] or not rows
    ends = [sample for table in (direct, *parts) for sample in table[:, 2].tolist() if sample >= 0]
    assert sorted(ends) == list(range(len(lengths)))
    assert starts[0] == 0 and starts[-1] == len(direct) and bool((starts.diff() >= 0).all())
    # A group begins where a sample does.
    assert all(start == 0 or direct[start - 1, 2] >= 0 for start in starts.tolist())
    assert all(len(table) <= 16 or (table[:, 2] >= 0).sum() == 1 for table in parts)  # 64 MiB, or one sample


@pytest.mark.parametrize("which", native.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(monkeypatch, which, dtype):
    # More tokens than are packed at a time, and more columns than a block has.
    x, dy, offsets, v, second, absolute = inputs([700, 1300, 9, 2100, 0, 3], (2100, 30), dtype)
    before = (second.clone(), absolute.clone())
    entry = dispatch.Backend(lambda *arguments: _cpu(*arguments, which))
    monkeypatch.setitem(dispatch._registry["sample_moments"], "cpu", entry)
    found = sample_moments(x, dy, offsets, v, second, absolute, rows=True, alpha=0.5)
    check(x, dy, offsets, v, second, absolute, 0.5, found, before)


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=4)))
def test_any_combination_gives_the_same_numbers(asked):
    x, dy, offsets, v, second, absolute = inputs([5, 64, 1, 0, 33], (65, 40), torch.float32)
    dotted, squared, summed, rows = asked
    whole = sample_moments(x, dy, offsets, v, all_second := second.clone(), all_absolute := absolute.clone(), rows=True)
    part = sample_moments(
        x, dy, offsets, v if dotted else None, second if squared else None, absolute if summed else None, rows=rows
    )
    assert torch.equal(part.squared_norms, whole.squared_norms)
    assert torch.equal(part.dots, whole.dots) if dotted else part.dots is None
    assert torch.equal(part.row_squared_norms, whole.row_squared_norms) if rows else part.row_squared_norms is None
    assert torch.equal(second, all_second) or not squared
    assert torch.equal(absolute, all_absolute) or not summed


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_strided_inputs_and_outputs(monkeypatch, backend):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    x, dy, offsets, v, second, absolute = inputs([4, 70, 0, 9], (33, 50), torch.float32)
    before = (second.clone(), absolute.clone())
    wide = torch.full((100, 66), torch.nan)
    wide[:50, ::2] = second
    turned = absolute.T.contiguous().T
    found = sample_moments(
        x.T.contiguous().T, dy.repeat(1, 2)[:, :50], offsets, v.T.contiguous().T, wide[:50, ::2], turned, rows=True
    )
    check(x, dy, offsets, v, wide[:50, ::2], turned, 1.0, found, before)
    assert bool(wide[50:].isnan().all()) and bool(wide[:, 1::2].isnan().all())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=7), st.integers(0, 2**31), st.integers(1, 3))
def test_a_sample_does_not_feel_its_batch_and_threads_change_no_bit(lengths, seed, threads):
    x, dy, offsets, v, second, _ = inputs(lengths, (40, 70), torch.float32, seed)
    together = sample_moments(x, dy, offsets, v, twin := second.clone(), rows=True, sketch_dim=64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = sample_moments(x, dy, offsets, v, second, rows=True, sketch_dim=64)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(second, twin)
    for one, other in zip(together, again, strict=True):
        assert torch.equal(one, other)
    for sample, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        alone = sample_moments(x[begin:end], dy[begin:end], torch.tensor([0, end - begin]), v, rows=True)
        for one, other in zip(together[:3], alone[:3], strict=True):
            # Zero rows of dy are skipped in some batches and multiplied by in others: rounding apart, the same.
            torch.testing.assert_close(one[sample], other[0], rtol=1e-5, atol=1e-6)


def test_nan_stays_with_its_sample():
    x, dy, offsets, v, *_ = inputs([3, 4, 5], (20, 30), torch.float32)
    dy[4, 2] = torch.nan
    found = sample_moments(x, dy, offsets, v, rows=True)
    assert found.squared_norms.isnan().tolist() == found.dots.isnan().tolist() == [False, True, False]
    assert found.row_squared_norms.isnan().nonzero().tolist() == [[1, 2]]


def test_opcheck_and_compile():
    x, dy, offsets, v, second, absolute = inputs([3, 0, 8], (9, 7), torch.float32)
    torch.library.opcheck(_op, (x, dy, offsets, v, second, absolute, True, 0.5))
    torch.library.opcheck(_op, (x, dy, offsets, None, None, None, False, 1.0))

    def use(x, dy, v, second):
        return sample_moments(2 * x, dy, offsets, v, second, rows=True).dots + 1

    eager = use(x, dy, v, one := second.clone())
    compiled = torch.compile(use, backend="aot_eager", fullgraph=True)(x, dy, v, other := second.clone())
    assert torch.equal(eager, compiled) and torch.equal(one, other)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"v": torch.ones(3, 3)}, ShapeError, r"v must be \[O, I\] = \[7, 9\]"),
        ({"second": torch.ones(7, 9, dtype=torch.bfloat16)}, DtypeError, "second must be torch.float32"),
        ({"absolute": torch.ones(7, 1).expand(7, 9)}, ShapeError, "absolute is an expanded view"),
        ({"second": torch.empty(7, 9, device="meta")}, DeviceError, "second must lie where x does"),
        ({"offsets": torch.tensor([0, 3, 2, 11])}, ShapeError, "offsets must not decrease"),
    ],
)
def test_mistakes_are_named(change, error, message):
    x, dy, offsets, *_ = inputs([3, 0, 8], (9, 7), torch.float32)
    with pytest.raises(error, match=message):
        sample_moments(**{"x": x, "dy": dy, "offsets": offsets, **change})


def test_outputs_that_share_memory_are_refused():
    x, dy, offsets, _, second, _ = inputs([3, 0, 8], (9, 7), torch.float32)
    with pytest.raises(ShapeError, match="second and absolute share memory"):
        sample_moments(x, dy, offsets, None, second, second)


@pytest.mark.skipif(native.extension is None, reason="a property of the C++ kernels")
def test_a_long_sample_of_equal_signs_keeps_its_digits(monkeypatch):
    """One running sum of float32 over 200,000 equal terms is off by 1e-3: every addition rounds the same way."""
    monkeypatch.setenv("FILLM_BACKEND", "cpu")
    rows, widths = 200_000, (7, 5)
    x, dy = (torch.full((rows, width), 0.1) for width in widths)
    entry = rows * float(x[0, 0]) * float(dy[0, 0])
    second, absolute = torch.zeros(2, *reversed(widths))
    offsets = torch.tensor([0, rows])
    moments = sample_moments(x, dy, offsets, torch.ones(5, 7), second, absolute)
    # 512 terms a sum, then the sums: each addition is off by at most 2^-24 of what has been summed.
    bound = (512 + rows / 512) * 2**-24
    for got, want, power in (
        (moments.squared_norms, 35 * entry**2, 2),
        (ghost_norm(x, dy, offsets, form="explicit"), 35 * entry**2, 2),
        (moments.dots, 35 * entry, 1),
        (second, entry**2, 2),
        (absolute, entry, 1),
    ):
        assert float((got.double() / want - 1).abs().max()) <= power * bound
