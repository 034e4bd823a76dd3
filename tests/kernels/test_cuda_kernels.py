"""The CUDA kernels, executed on the CPU: what the ops' own tests, which run them too, do not show."""

import pytest
import torch
from fillm_kernels import BackendError, NotANumberError, backends, dispatch, native, sketch, top_mask
from fillm_kernels.cuda import calls
from fillm_kernels.cuda import sketch as cuda_sketch
from fillm_kernels.cuda import top_mask as cuda_top_mask
from fillm_kernels.sketch import _reference
from fillm_kernels.top_mask import unpack_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cuda_host import MACHINES, machine
from tests.kernels.ragged import DTYPES

SPARSE = ("oporp", "countsketch", "sjlt")
PIECE = 16384  # scores; csrc/cuda/top_mask.h
pytestmark = pytest.mark.usefixtures("cuda_on_cpu")


def integers(samples: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: every sum of them is exact, so results are right to the bit or wrong."""
    return torch.randint(-8, 9, (samples, count)).to(dtype)


@pytest.mark.parametrize("setting", MACHINES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPARSE)
def test_sketches_of_whole_numbers_are_exact_on_every_machine(kind, dtype, setting):
    with machine(*setting):
        # Runs of one bin, of less and more than a warp's 128, of several thread blocks; several groups and parts.
        for samples, count, dim in (
            (2, 65, 4),
            (1, 1009, 61 * 4),
            (2, 20_000, 128),
            (1, 9001, 1028),
            (1, 30_011, 4096),
        ):
            g = integers(samples, count, dtype)
            for offset in (0, 2**31 + 5, 2**61):
                got = sketch(g, dim, kind, 7, offset=offset)
                assert torch.equal(got.double(), _reference(g, dim, kind, 7, 4, offset))


@pytest.mark.parametrize("kind", SPARSE)
def test_bits_of_a_sketch_depend_neither_on_the_machine_nor_on_other_rows(kind):
    g, results = torch.randn(3, 5000), []
    for setting in MACHINES:
        with machine(*setting):
            results += [
                sketch(g, 132, kind, 7, offset=9),
                torch.cat([sketch(r[None], 132, kind, 7, offset=9) for r in g]),
            ]
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SPARSE), st.integers(0, 3000), st.integers(1, 90), st.integers(0, 2**50), st.integers(0, 2**62))
def test_any_sketch_of_whole_numbers_is_exact(kind, count, dim, offset, seed):
    dim = 4 * dim if kind == "sjlt" else dim
    g = integers(2, count)
    assert torch.equal(sketch(g, dim, kind, seed, offset=offset).double(), _reference(g, dim, kind, seed, 4, offset))


def test_rows_and_entries_may_be_further_apart_than_32_bits_reach():
    """A view of two rows 2^32 entries apart, and of three entries 2^31 apart: only what is read is ever in memory."""
    room = torch.empty(2**32 + 64, dtype=torch.bfloat16)  # pages that nobody touches take no memory
    room[:9] = room[2**32 : 2**32 + 9] = integers(1, 9, torch.bfloat16)[0]
    rows = room.as_strided((2, 9), (2**32, 1))
    assert torch.equal(sketch(rows, 8).double(), _reference(rows.clone(), 8, "oporp", 0, 4, 0))
    room[2**31] = 3
    entries = room.as_strided((1, 3), (1, 2**31))
    assert torch.equal(sketch(entries, 8).double(), _reference(entries.clone(), 8, "oporp", 0, 4, 0))


def test_dense_kinds_go_on_to_the_next_backend_and_forced_are_an_error(monkeypatch):
    g = torch.randn(2, 30)
    with pytest.raises(BackendError, match="FILLM_BACKEND=cuda: .* computes the sparse kinds only, not gaussian"):
        sketch(g, 8, "gaussian")
    monkeypatch.delenv("FILLM_BACKEND")
    monkeypatch.setattr(dispatch, "PREFERENCE", ("cuda", "torch"))
    ran = []
    monkeypatch.setattr(cuda_sketch, "launch", lambda *arguments: ran.append(arguments[2]) or _reference(*arguments))
    dense, sparse = sketch(g, 8, "gaussian"), sketch(g, 8, "oporp")
    assert ran[-1] == "oporp" and "gaussian" not in ran
    torch.testing.assert_close(dense, _reference(g, 8, "gaussian", 0, 4, 0).float())
    torch.testing.assert_close(sparse, _reference(g, 8, "oporp", 0, 4, 0).float())


def by_stable_sort(scores: list[Tensor], budget: int) -> list[Tensor]:
    joined = torch.cat([tensor.flatten() for tensor in scores]).double()
    chosen = torch.zeros(joined.shape[0], dtype=torch.bool)
    chosen[joined.sort(descending=True, stable=True).indices[:budget]] = True
    return list(chosen.split([tensor.numel() for tensor in scores]))


def assert_chosen(scores: list[Tensor], budget: int) -> None:
    got = top_mask(scores, budget)
    for bits, tensor, want in zip(got.bits, scores, by_stable_sort(scores, budget), strict=True):
        assert torch.equal(unpack_bits(bits, tensor.numel()), want)
        spare = -tensor.numel() % 8
        assert not spare or int(bits[-1]) >> (8 - spare) == 0


@pytest.mark.parametrize("setting", MACHINES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_over_many_pieces_on_every_machine(dtype, setting):
    # Tensors of one piece and of several, with full and part-filled ones, and empty tensors between them.
    sizes = (3 * PIECE, 0, 1, PIECE - 1, 0, 2 * PIECE + 77, 31)
    scores = [(torch.randn(size) * 8).round().div(8).to(dtype) for size in sizes]
    scores[5][:PIECE] = 0.125  # a piece of nothing but ties
    with machine(*setting):
        for budget in (1, 40_000, 60_001, sum(sizes) - 1):
            assert_chosen(scores, budget)


@pytest.mark.parametrize("setting", MACHINES[1:], ids=str)
def test_ties_past_the_budget_are_found_over_more_pieces_than_a_warp_looks_back_on(setting):
    scores = [torch.zeros(40 * PIECE + 5), torch.zeros(3)]
    scores[0][7] = 1
    with machine(*setting):
        for budget in (2, 33 * PIECE + 12, 40 * PIECE + 6):
            assert_chosen(scores, budget)


@pytest.mark.parametrize("setting", MACHINES, ids=str)
def test_counters_of_16_bits_hold_more_than_16_bits(setting):
    """One digit for all, by whole warps; and two digits in turn, whose counters share a word, lane by lane."""
    with machine(*setting):
        assert_chosen([torch.full((9 * PIECE,), -2.5)], 70_000)
        low, high = torch.tensor([0x3F800000, 0x3F810000], dtype=torch.int32).view(torch.float32)
        mixed = torch.where(torch.arange(9 * PIECE) % 2 == 0, low, high)
        assert_chosen([mixed], 70_000)


def test_the_first_tensor_with_a_nan_is_named_on_every_machine():
    scores = [torch.zeros(2 * PIECE), torch.zeros(PIECE + 9), torch.zeros(5)]
    scores[1][PIECE + 3] = scores[2][0] = torch.nan
    for setting in MACHINES:
        with machine(*setting), pytest.raises(NotANumberError, match=rf"scores\[1\] is NaN at flat index {PIECE + 3}"):
            top_mask(scores, 9)


def test_extra_memory_of_a_mask_is_small(monkeypatch):
    """Bytes asked for beside the bits; they grow by 8 a piece, so 8e9 scores take under 64 MiB by far."""
    taken, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: taken.append(zeros(*a, **k).nbytes) or zeros(*a, **k))
    cuda_top_mask.launch([torch.randn(2 * PIECE)], 100)
    fixed = (1 << 16) * 8
    assert taken == [fixed + 2 * 8]
    assert fixed + 8 * (8 * 10**9 // PIECE + 1) < 64 << 20


@pytest.mark.parametrize("op", ["sketch", "top_mask"])
def test_the_self_check_passes_and_finds_a_kernel_that_is_off(op, monkeypatch):
    module = {"sketch": cuda_sketch, "top_mask": cuda_top_mask}[op]
    monkeypatch.setattr(dispatch, "_self_checks", dispatch.SelfChecks())
    for dtype in DTYPES:
        dispatch.select(op, "cpu", dtype)
    assert dispatch._self_checks.failure(op, "cuda") is None
    monkeypatch.setattr(dispatch, "_self_checks", dispatch.SelfChecks())
    launch = module.launch
    off = {"sketch": lambda g, *rest: launch(g * 1.001, *rest), "top_mask": lambda s, budget: launch(s, budget + 1)}
    monkeypatch.setattr(module, "launch", off[op])
    with pytest.warns(RuntimeWarning, match="off from the reference"), pytest.raises(BackendError, match="self-check"):
        dispatch.select(op, "cpu", torch.float32)


def test_small_cases_meet_what_they_are_for():
    scores, budget = cuda_top_mask.small_case(torch.bfloat16, torch.device("cpu"))
    threshold = torch.cat(scores).sort(descending=True).values[budget - 1]
    above = [int((tensor >= threshold).sum()) for tensor in scores]
    assert threshold < 0 and sum(above) > budget and max(map(len, scores)) > PIECE


def test_what_cuda_refuses_is_an_error_by_name():
    def refuses(**arguments):
        raise RuntimeError("CUDA launch: no kernel image is available for execution on the device")

    with pytest.raises(BackendError, match="CUDA launch: no kernel image"):
        calls.call(refuses, torch.ones(1))


def test_without_the_extension_or_a_device_the_reason_is_put_in_words(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nor there: torch finds no CUDA device" in backends()["sketch"]["refused"]["cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_load_cuda", lambda: "the CUDA extension fillm_kernels._CUDA is missing (test)")
    assert "nor there: the CUDA extension" in backends()["top_mask"]["refused"]["cuda"]
    assert backends()["top_mask"]["used"]["cuda"] != "cuda"
    with pytest.raises(BackendError, match="missing"):
        native.cuda_extension()


def test_the_machine_finds_a_missing_barrier_and_threads_that_wait_in_vain(cuda_on_cpu):
    numbers, got = torch.arange(64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    for barrier in (True, False):
        outcomes = []
        for setting in MACHINES:
            with machine(*setting):
                cuda_on_cpu.run_reversed(numbers.data_ptr(), got.data_ptr(), barrier)
            outcomes.append(torch.equal(got, numbers.flip(0)))
        assert all(outcomes) if barrier else not any(outcomes)
    cuda_on_cpu.run_waiting(64)
    with pytest.raises(RuntimeError, match="threads wait in vain"):
        cuda_on_cpu.run_waiting(33)
