import subprocess
import sys
from pathlib import Path

import fillm_kernels
import numpy as np
import pytest
import torch
from fillm_kernels import DtypeError, NotANumberError, ShapeError, native, top_mask
from fillm_kernels.top_mask import _cpu, pack_bits, unpack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "torch", "triton", "cuda", "reference")  # cuda: on the CPU, tests/kernels/cuda_host.py
SIZES = (0, 1, 63, 64, 65, 1009, 5003)  # both sides of words and blocks, primes, an empty tensor


def by_sorting(scores: list[Tensor], budget: int) -> tuple[list[np.ndarray], float]:
    """The mask from the definition: order all entries by (-score, position), with Python's own sort."""
    joined = [float(value) for tensor in scores for value in tensor.flatten()]
    order = sorted(range(len(joined)), key=lambda i: (-joined[i], i))[:budget]
    chosen = np.zeros(len(joined), dtype=bool)
    chosen[order] = True
    parts = np.split(chosen, np.cumsum([tensor.numel() for tensor in scores])[:-1])
    return [np.packbits(part, bitorder="little") for part in parts], joined[order[-1]] if budget else np.inf


def assert_is_the_mask(got: tuple[list[Tensor], Tensor], scores: list[Tensor], budget: int) -> None:
    bits, threshold = by_sorting(scores, budget)
    assert [part.tolist() for part in got[0]] == [part.tolist() for part in bits]
    assert float(got[1]) == threshold
    assert sum(int(np.unpackbits(part.numpy()).sum()) for part in got[0]) == budget


def scores_of(kind: str, dtype: torch.dtype) -> list[Tensor]:
    scores = [torch.randn(size).to(dtype) for size in SIZES]
    if kind == "ties":  # some fifty values, each in every tensor
        scores = [(tensor.float() * 8).round().div(8).to(dtype) for tensor in scores]
    if kind == "equal":
        scores = [torch.full_like(tensor, -2.5) for tensor in scores]
    if kind == "special":
        info = torch.finfo(dtype)
        values = [0.0, -0.0, torch.inf, -torch.inf, info.max, info.min, info.tiny, -info.tiny, info.tiny / 2, 1.0]
        choice = torch.tensor(values, dtype=dtype)
        scores = [choice[torch.randint(len(values), tensor.shape)] for tensor in scores]
    return scores


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_with_a_sort_to_the_bit(backend, dtype, kind, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    scores = scores_of(kind, dtype)
    total = sum(SIZES)
    # The interpreter takes its time.
    budgets = (130, total - 1) if backend == "triton" else (0, 1, 2, 130, total // 3, total - 1, total)
    for budget in budgets:
        got = top_mask(scores, budget)
        assert got.threshold.dtype == dtype
        assert_is_the_mask(got, scores, budget)


@pytest.mark.parametrize("kind", ["distinct", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_instruction_set_of_this_processor(instruction_set, dtype, kind):
    scores = scores_of(kind, dtype)
    for budget in (0, 1, 130, 3001, sum(SIZES)):
        assert_is_the_mask(_cpu(scores, budget, instruction_set), scores, budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_numbers_of_a_narrow_type_are_put_in_order(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()][torch.randperm(int((~every.isnan()).sum()))]
    for budget in (1, 700, 31000, 33000, len(every) - 1):
        for instruction_set in native.instruction_sets():
            got = _cpu([every], budget, instruction_set)
            want = every.double().sort(descending=True, stable=True).indices[:budget]
            assert torch.equal(unpack_bits(got[0][0], len(every)).nonzero()[:, 0], want.sort().values)
            assert float(got[1]) == float(every[want[-1]])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ties_span_many_pieces_and_threads(backend, monkeypatch):
    # Pieces of 2^16 (C++) and 2^20 (torch) scores; the quota of ties ends inside one of them.
    monkeypatch.setenv("FILLM_BACKEND", backend)
    scores = [torch.zeros(200_001), torch.zeros(3), torch.zeros(1_200_000)]
    scores[0][150_000] = scores[2][7] = 1
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for budget in (1, 2, 3, 150_000, 200_004, 900_001):
                got = top_mask(scores, budget)
                chosen = torch.cat([unpack_bits(b, len(s)) for b, s in zip(got.bits, scores, strict=True)])
                want = torch.zeros(1_400_004, dtype=torch.bool)
                want[150_000] = True
                want[200_004 + 7] = budget > 1
                quota = max(0, budget - 2)
                want[(~want).nonzero()[:quota, 0]] = True
                assert torch.equal(chosen, want)
                assert float(got.threshold) == (1.0 if budget <= 2 else 0.0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_refused_and_named(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for dtype in DTYPES:
        for sign in (1.0, -1.0):
            scores = [torch.zeros(70, dtype=dtype), torch.full((9, 13), torch.inf, dtype=dtype)]
            scores[1][4, 5] = scores[1][8, 8] = torch.tensor(torch.nan, dtype=dtype).copysign(torch.tensor(sign))
            for budget in (0, 5):
                with pytest.raises(NotANumberError, match=r"scores\[1\] is NaN at flat index 57"):
                    top_mask(scores, budget)
    smallest = torch.tensor([0x7F800001, 0xFF800001 - (1 << 32)], dtype=torch.int32).view(torch.float32)
    for bad in smallest:  # the NaNs next to the infinities
        with pytest.raises(NotANumberError):
            top_mask([bad[None]], 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_scores_count_in_row_major_order_and_stay_unchanged(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    room = torch.randn(40, 30)
    for view in (room.T, room[::2, 3:20], room[:1].expand(5, 30), room.flip(0)):
        before = view.clone()
        assert_is_the_mask(top_mask([view], 77), [view.contiguous()], 77)
        assert torch.equal(view, before)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_memory_that_was_never_written_does_not_reach_the_result(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    scores = scores_of("ties", torch.float32)
    want = top_mask(scores, 999)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(255))
    got = top_mask(scores, 999)
    assert all(torch.equal(a, b) for a, b in zip(got.bits, want.bits, strict=True))


def test_numpy_arrays_come_in_and_bits_are_those_of_numpy():
    chosen = torch.rand(5, 27) < 0.4
    assert pack_bits(chosen).tolist() == np.packbits(chosen.numpy(), bitorder="little").tolist()
    assert torch.equal(unpack_bits(pack_bits(chosen), 135), chosen.flatten())
    array = np.random.randn(100).astype(np.float32)
    assert_is_the_mask(top_mask([array], 40), [torch.from_numpy(array)], 40)


def test_arguments_that_do_not_fit_are_refused():
    x = torch.ones(4)
    for scores, budget, error, words in [
        ([], 0, ShapeError, "at least one"),
        ([x], -1, ShapeError, "between 0 and the number of scores, 4; got -1"),
        ([x, x], 9, ShapeError, "8; got 9"),
        ([x, x.double()], 1, DtypeError, r"scores\[1\] is torch.float64"),
        ([x.int()], 1, DtypeError, "int32"),
        ([[1.0]], 1, DtypeError, r"scores\[0\] is a list"),
    ]:
        with pytest.raises(error, match=words):
            top_mask(scores, budget)


def test_custom_op_is_registered_as_torch_expects_and_compiles_as_one_graph():
    scores = [torch.randn(3, 7), torch.randn(20)]
    torch.library.opcheck(torch.ops.fillm_kernels.top_mask.default, (scores, 11))
    compiled = torch.compile(lambda a, b: top_mask([a, b], 11).bits[1] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*scores), top_mask(scores, 11).bits[1] + 1)


# Without bounds hypothesis drops a whole example for every number past the largest float16.
halves = st.floats(-65504, 65504, width=16) | st.sampled_from([float("inf"), float("-inf")])
values = st.lists(st.lists(halves, max_size=40), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(values, st.data())
def test_any_scores_give_the_mask_of_a_sort_and_masks_are_nested(lists, data):
    scores = [torch.tensor(entries, dtype=torch.float32) for entries in lists]
    budget = data.draw(st.integers(0, sum(len(entries) for entries in lists)))
    got = top_mask(scores, budget)
    assert_is_the_mask(got, scores, budget)
    smaller = top_mask(scores, budget // 2)
    assert all(torch.equal(a & b, a) for a, b in zip(smaller.bits, got.bits, strict=True))


BILLION = """
import sys, torch
from fillm_kernels import top_mask
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) << 10
entries, budget = 10**9, 123_456_789
scores = torch.empty(entries)
for part in scores.split(1 << 20): part.copy_(torch.arange(part.shape[0]) % 1000)
top_mask([scores[:100]], 7)
before = peak()
bits, threshold = top_mask([scores], budget)
extra = peak() - before - bits[0].numel()
ones = torch.tensor([byte.bit_count() for byte in range(256)])
assert sum(int(ones[part.int()].sum()) for part in bits[0].split(1 << 20)) == budget
print(extra, float(threshold))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory where Linux keeps it")
def test_a_billion_scores_take_less_than_64_mib_beside_their_bits():
    environment = {"PYTHONPATH": str(Path(fillm_kernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", BILLION], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    extra, threshold = run.stdout.split()
    assert int(extra) < 64 << 20
    # Rising 0..999 over and over (but for the last, shorter run of each 2^20): one in a thousand of each value.
    assert float(threshold) == 876


def test_a_tensor_is_no_list_of_tensors():
    with pytest.raises(ShapeError, match="scores must be a list of tensors; put a single one into a list"):
        top_mask(torch.rand(3, 4), 2)
