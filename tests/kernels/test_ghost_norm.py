import numpy as np
import pytest
import torch
from fillm_kernels import DtypeError, ShapeError, ghost_norm, native
from fillm_kernels.ghost_norm import _cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ragged import DTYPES, LENGTHS, WIDTHS, assert_within, gradients, magnitudes, precision, ragged

BACKENDS = ("cpu", "torch", "reference")
FORMS = ("auto", "gram", "explicit")


def squared_norms(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    return gradients(x, dy, offsets).square().sum((1, 2))  # pairwise sums: a running one would lose digits of its own


def bound(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    # A dot product of n <= 1100 terms in at least 4 partial sums, and the product of two of them, are each wrong by
    # some 32 roundings at most on random data; where pairs (t, s) cancel, relative to (sum_t |x_t| |dy_t|)^2 only.
    u = precision(x.dtype)
    return 128 * u * squared_norms(x, dy, offsets) + 4 * u * magnitudes(x, dy, offsets) ** 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_with_gradients_formed_in_float64(backend, dtype, form, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for lengths in LENGTHS:
        for inputs, outputs in WIDTHS:
            x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
            got = ghost_norm(x, dy, offsets, form=form)
            assert got.shape == (len(lengths),)
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_within(got, squared_norms(x, dy, offsets), bound(x, dy, offsets))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_instruction_set_of_this_processor(instruction_set, dtype, form):
    for lengths in LENGTHS:
        for inputs, outputs in WIDTHS:
            x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
            got = _cpu(x, dy, offsets, form, instruction_set)
            assert_within(got, squared_norms(x, dy, offsets), bound(x, dy, offsets))


def test_half_precision_special_values_are_widened_exactly():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()][:, None]
    one = torch.ones_like(every)
    offsets = torch.arange(len(every) + 1)
    want = every.double()[:, 0] ** 2
    for instruction_set in native.instruction_sets():
        assert torch.equal(_cpu(every, one, offsets, "gram", instruction_set), want)
        assert torch.equal(_cpu(one, every, offsets, "explicit", instruction_set), want)


@pytest.mark.parametrize("length", [600, 1300])
@pytest.mark.parametrize("form", FORMS)
def test_long_samples_span_several_blocks(form, length):
    x, dy, offsets = ragged([length, 3], 70, 130)
    assert_within(ghost_norm(x, dy, offsets, form=form), squared_norms(x, dy, offsets), bound(x, dy, offsets))


def test_wide_layers_span_several_feature_chunks(monkeypatch):
    x, dy, offsets = ragged([9, 70], 2050, 3000)
    for backend in ("cpu", "torch"):
        monkeypatch.setenv("FILLM_BACKEND", backend)
        for form in FORMS:
            assert_within(ghost_norm(x, dy, offsets, form=form), squared_norms(x, dy, offsets), bound(x, dy, offsets))


def test_torch_backend_cuts_long_samples_into_blocks(monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "torch")
    monkeypatch.setitem(ghost_norm.__globals__, "BLOCK_ENTRIES", 1000)
    x, dy, offsets = ragged([61, 7, 5, 6, 0, 90], 20, 30)
    for form in ("gram", "explicit"):
        assert_within(ghost_norm(x, dy, offsets, form=form), squared_norms(x, dy, offsets), bound(x, dy, offsets))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_as_they_are_and_left_unchanged(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    wide, tall, offsets = torch.randn(30, 90), torch.randn(33, 60), torch.tensor([0, 11, 11, 30])
    for x, dy in [
        (wide[:, 7:50], wide[:, 50:]),  # rows apart
        (wide[:, ::3], tall.T[:30]),  # entries apart, transposed
        (wide[:1].expand(30, 90), wide[:, :5]),  # one row for all
        (wide.flip(0), wide[:, :1]),
    ]:
        before = x.clone(), dy.clone()
        got = ghost_norm(x, dy, offsets)
        assert_within(got, squared_norms(x, dy, offsets), bound(x, dy, offsets))
        assert torch.equal(x, before[0])
        assert torch.equal(dy, before[1])


def test_zero_rows_of_dy_hide_whatever_stands_in_x():
    x, dy, offsets = ragged([6, 4], 33, 20)
    dy[[0, 3, 9]] = 0
    want = squared_norms(x, dy, offsets)
    x[[0, 3, 9]] = torch.nan
    assert_within(ghost_norm(x, dy, offsets), want, bound(x.nan_to_num(), dy, offsets))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_reach_the_result_of_their_sample_alone(backend, form, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    x, dy, offsets = ragged([6, 4, 5], 33, 20)
    dy[0, 19] = torch.nan
    x[11] = torch.inf
    dy[11] = 1
    got = ghost_norm(x, dy, offsets, form=form)
    assert got.isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize("poison", [torch.nan, 1e30])
def test_memory_that_was_never_written_does_not_reach_the_result(poison, monkeypatch):
    x, dy, offsets = ragged([70, 33, 0], 37, 41)
    want = [ghost_norm(x, dy, offsets, form=form) for form in FORMS]
    for form in FORMS:  # the scratch memory of every thread, kept between calls
        ghost_norm(torch.full_like(x, poison), torch.full_like(dy, poison), offsets, form=form)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(size, poison, **options))
    assert all(torch.equal(ghost_norm(x, dy, offsets, form=form), norm) for form, norm in zip(FORMS, want, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_bits_depend_neither_on_threads_nor_on_the_run(form):
    x, dy, offsets = ragged([150, 3, 40, 77], 150, 210)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(_cpu(x, dy, offsets, form))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_numpy_arrays_and_dlpack_objects_come_in():
    x, dy, offsets = ragged([3, 5], 6, 7)
    want = ghost_norm(x, dy, offsets)
    locked = x.numpy().copy()
    locked.flags.writeable = False
    assert torch.equal(ghost_norm(locked, dy.numpy(), offsets.numpy()), want)
    backwards = np.ascontiguousarray(x.numpy()[:, ::-1])[:, ::-1]
    assert torch.equal(ghost_norm(backwards, dy, offsets), want)

    class Foreign:
        def __dlpack__(self, **options):
            return x.__dlpack__(**options)

        def __dlpack_device__(self):
            return x.__dlpack_device__()

    assert torch.equal(ghost_norm(Foreign(), dy, offsets), want)


@pytest.mark.parametrize(
    ("x", "dy", "offsets", "error", "words"),
    [
        ((4, 3), (5, 3), [0, 4], ShapeError, r"\[4, 3\] and \[5, 3\]"),
        ((4, 3, 1), (4, 3), [0, 4], ShapeError, "must be"),
        ((4, 3), (4, 3), [], ShapeError, "at least one"),
        ((4, 3), (4, 3), [[0, 4]], ShapeError, r"\[B \+ 1\]"),
        ((4, 3), (4, 3), [0, 3], ShapeError, "from 0 to N = 4; they run from 0 to 3"),
        ((4, 3), (4, 3), [1, 4], ShapeError, "from 1 to 4"),
        ((4, 3), (4, 3), [0, 3, 2, 4], ShapeError, r"offsets\[2\] = 2 comes after 3"),
        ((4, 3), (4, 3), [0, 9, 4], ShapeError, r"offsets\[2\] = 4 comes after 9"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(x, dy, offsets, error, words):
    with pytest.raises(error, match=words):
        ghost_norm(torch.ones(x), torch.ones(dy), torch.tensor(offsets, dtype=torch.int64))


def test_types_that_do_not_fit_are_refused():
    x, offsets = torch.ones(2, 2), torch.tensor([0, 2])
    for bad, words in [
        ((x, x.double(), offsets), "share one of"),
        ((x.int(), x.int(), offsets), "share one of"),
        ((x, x, offsets.int()), "offsets must be int64"),
        (([[1.0]], x, offsets), "x is a list"),
        ((x, np.array([["a"]]), offsets), "dy: "),
    ]:
        with pytest.raises(DtypeError, match=words):
            ghost_norm(*bad)
    with pytest.raises(ShapeError, match="form must be one of"):
        ghost_norm(x, x, offsets, form="best")


lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_a_norm_does_not_depend_on_who_else_is_in_the_call(lengths, inputs, outputs, seed):
    x, dy, offsets = ragged(lengths, inputs, outputs, seed=seed)
    together = ghost_norm(x, dy, offsets)
    for sample, length in enumerate(lengths):
        rows = slice(int(offsets[sample]), int(offsets[sample + 1]))
        alone = ghost_norm(x[rows], dy[rows], torch.tensor([0, length]))
        assert torch.equal(alone[0], together[sample])


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, st.integers(-20, 20), st.integers(0, 99))
def test_scaling_dy_by_a_power_of_two_scales_the_norm_by_its_square_to_the_bit(lengths, exponent, seed):
    x, dy, offsets = ragged(lengths, 19, 23, seed=seed)
    assert torch.equal(ghost_norm(x, dy * 2.0**exponent, offsets), ghost_norm(x, dy, offsets) * 4.0**exponent)
