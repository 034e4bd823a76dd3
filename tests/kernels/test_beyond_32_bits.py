"""Addresses, coordinates and weights past 2^31, in memory that is promised and never taken.

Pages of an anonymous mapping exist once they are written; what is only read is one page of zeros. So tensors of many
gigabytes cost what their few nonzero entries cost, and the tests run on small machines.
"""

import itertools
import mmap

import pytest
import torch
from fillm_kernels import (
    dispatch,
    masked_adamw_,
    masked_norm,
    masked_sophia_,
    outer_sketch,
    sample_moments,
    select_bits,
    select_rows,
    sketch,
    top_mask,
)
from torch import Tensor

from tests.kernels.contract import SMALL, assert_is, changed
from tests.kernels.contracts import CONTRACTS
from tests.kernels.law import projection

NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: the promise is not counted against the machine's memory
# Row numbers and strides that fit 32 bits where their product does not, and a stride that itself does not: the
# interpreter of many programs is spared the second, whose first product is wrong already.
STEPS = (2**29 - 16, 2**31 + 7)
CASES = [
    (contract, backend, step)
    for contract in CONTRACTS
    for backend in contract.backends()
    for step in STEPS
    if backend in ("cpu", "torch") or (backend == "triton" and (step == STEPS[0] or not contract.many_programs))
]
LONG = 2**31 + 5003

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="this system has no anonymous mappings")


def promised(entries: int, dtype: torch.dtype) -> Tensor:
    """Zeros, [entries], that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, entries * dtype.itemsize, flags=flags), dtype=dtype)


def spread(tensor: Tensor, step: int) -> Tensor:
    """The same numbers, slices of the first long dimension `step` entries apart, the others side by side."""
    lead = next((d for d, size in enumerate(tensor.shape) if size > 1), None)
    if lead is None:
        return tensor
    inner = tensor.shape[lead + 1 :]
    strides = [0] * lead + [step, *torch.empty(inner, device="meta").stride()]
    room = promised((tensor.shape[lead] - 1) * step + max(1, inner.numel()), tensor.dtype)
    view = room.as_strided(tensor.shape, strides)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize(("contract", "backend", "step"), CASES, ids=[f"{c.name}-{b}-{s}" for c, b, s in CASES])
def test_rows_more_than_32_bits_apart_are_read_and_written_where_they_are(contract, backend, step, monkeypatch):
    entry = dispatch._registry[contract.op][backend]
    if reason := entry.refusal("cpu"):
        pytest.skip(f"{backend}: {reason}; these mappings are memory of the CPU")
    monkeypatch.setenv("FILLM_BACKEND", backend)
    given = contract.build(SMALL, torch.bfloat16)
    answer = contract.answer(given)

    def place(name: str, tensor: Tensor) -> Tensor:
        # What is whole numbers, or must be contiguous, stays; a step of 2^31 in 8 bytes would pass 2^36.
        movable = tensor.is_floating_point() and name.split("[")[0] not in contract.contiguous
        return spread(tensor, step) if movable else tensor

    far = changed(given, place)
    assert_is(contract.results(far), answer, contract)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dim"), [("oporp", 4096), ("countsketch", 4096), ("sjlt", 4096)])
def test_a_sketch_of_more_than_2_31_coordinates(kind, dim):
    places = [0, 2**31 - 1, 2**31, 2**31 + 4097, LONG - 1]
    g = promised(LONG, torch.bfloat16)[None]
    want = torch.zeros(1, dim, dtype=torch.float64)
    for value, place in enumerate(places, 1):
        g[0, place] = value
        want += value * projection(kind, 11, dim, 1, offset=place)
    assert torch.equal(sketch(g, dim, kind, 11).double(), want)


@pytest.mark.slow
def test_a_gradient_of_more_than_2_31_entries():
    outputs, inputs = 2**15 + 3, 2**16 + 5
    x, dy, offsets = torch.zeros(1, inputs), torch.ones(1, outputs) * 0.0, torch.tensor([0, 1])
    rows, columns = [0, 7, outputs - 1], [0, 2**15 + 1, inputs - 1]
    x[0, columns], dy[0, rows] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 4.0])
    want = torch.zeros(1, 4096, dtype=torch.float64)
    for row, column in itertools.product(rows, columns):
        want += float(dy[0, row] * x[0, column]) * projection("oporp", 3, 4096, 1, offset=row * inputs + column)
    assert (outputs - 1) * inputs > 2**31
    assert torch.equal(outer_sketch(x, dy, offsets, 4096, seed=3).double(), want)
    # `second` is written a tile at a time, zeros added to zeros: 8 GiB of it would be memory, so rows lie on each other
    # no longer; the norm of every row says which entries were formed.
    found = sample_moments(x, dy, offsets, rows=True)
    assert found.squared_norms.tolist() == [18.0 * 14.0]
    assert found.row_squared_norms[0, rows].tolist() == [14.0, 14.0, 16 * 14.0]


@pytest.mark.slow
def test_a_mask_over_more_than_2_31_scores():
    scores = promised(LONG, torch.bfloat16)
    high, low = [3, 2**31 - 1, 2**31, LONG - 1], [5, 2**31 + 77]
    scores[high], scores[low] = 1.0, -1.0
    few = top_mask([scores], 4)
    assert float(few.threshold) == 1.0
    assert set_bits(few.bits[0]) == high
    # The quota of zeros ends past 2^31: all but the last hundred of them.
    zeros = LONG - len(high) - len(low)
    many = top_mask([scores], len(high) + zeros - 100)
    clear = LONG // 8 * 8 - 8 * 40
    assert float(many.threshold) == 0.0
    tail = many.bits[0][clear // 8 :]
    got = [clear + 8 * byte + bit for byte in range(len(tail)) for bit in range(8) if not int(tail[byte]) >> bit & 1]
    left_out = list(range(LONG - 101, LONG - 1))  # the last weight is one of the high ones
    assert got == [*left_out, *range(LONG, (LONG + 7) // 8 * 8)]
    assert ones_of(many.bits[0]) == len(high) + zeros - 100


def set_bits(bits: Tensor) -> list[int]:
    found = []
    for at, part in enumerate(bits.split(1 << 24)):
        for byte in part.nonzero()[:, 0].tolist():
            found += [8 * (at * (1 << 24) + byte) + bit for bit in range(8) if int(part[byte]) >> bit & 1]
    return found


def ones_of(bits: Tensor) -> int:
    counts = torch.tensor([byte.bit_count() for byte in range(256)])
    return sum(int((part.bincount(minlength=256) * counts).sum()) for part in bits.split(1 << 24))


@pytest.mark.slow
def test_steps_on_single_weights_past_2_31():
    places = [0, 2**31 - 1, 2**31, 2**31 + 4097, LONG - 1]
    bits = promised((LONG + 7) // 8, torch.uint8)
    param, grad = promised(LONG, torch.bfloat16), promised(LONG, torch.bfloat16)
    for at in places:
        bits[at // 8] += 1 << at % 8
    param[places], grad[places] = 1.0, torch.tensor([1.0, 2, 3, 4, 5]).bfloat16()
    grad[[1, 2**31 + 1]] = torch.nan  # outside of the mask
    selection = select_bits(bits, LONG)
    assert selection.count == 5 and selection.starts[-4:].tolist() == [2, 3, 3, 5]
    assert float(masked_norm(grad, selection)) == 55.0**0.5
    state = selection.new_state(param)
    masked_adamw_(param, grad, state, selection, step=1, lr=0.5, betas=(0.5, 0.75), weight_decay=0.0, eps=0.0)
    assert param[places].tolist() == [0.5] * 5  # the first step of AdamW is lr times the sign
    assert state[0].tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert param[[1, 2**31 + 1, LONG - 2]].tolist() == [0.0] * 3


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton", "reference"])
def test_steps_on_rows_past_2_31(backend, monkeypatch):
    if reason := dispatch._registry["masked_adamw_"][backend].refusal("cpu"):
        pytest.skip(f"{backend}: {reason}; these mappings are memory of the CPU")
    monkeypatch.setenv("FILLM_BACKEND", backend)
    columns = 1024
    shape = (2**21 + 3, columns)  # the last rows begin past 2^31
    rows = torch.tensor([1, 2**21, 2**21 + 2])
    for step in (masked_adamw_, masked_sophia_):
        param = promised(shape[0] * columns, torch.bfloat16).view(shape)
        grad = promised(shape[0] * columns, torch.bfloat16).view(shape)
        param[rows], grad[rows] = 1.0, 2.0
        grad[0, 0] = grad[2**21 + 1, 5] = torch.nan
        selection = select_rows(rows, shape)
        assert float(masked_norm(grad, selection)) == (4.0 * 3 * columns) ** 0.5
        options = {"step": 1} if step is masked_adamw_ else {}
        step(param, grad, selection.new_state(param), selection, lr=0.5, betas=(0.5, 0.75), weight_decay=0.0, **options)
        assert bool((param[rows] == 0.5).all())
        assert not param[[0, 2, 2**21 - 1, 2**21 + 1]].any()
