from itertools import pairwise

import pytest
import torch
from fillm_kernels import DeviceError, DtypeError, ShapeError, ghost_gram, ghost_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ragged import DTYPES, assert_within, gradients, precision, ragged, triton_device

BACKENDS = ("cpu", "torch", "reference", "triton")
PAIRS = (([0, 1, 2, 5, 0, 63, 64, 65], [3, 131, 0]), ([17] * 8, [1]), ([0, 0], [4]), ([], [2]), ([200], [129, 2]))
WIDTHS = ((1, 1), (63, 65), (64, 64), (131, 96))
Side = tuple[Tensor, Tensor, Tensor]


def grams(first: Side, second: Side) -> Tensor:
    return torch.einsum("boi,coi->bc", gradients(*first), gradients(*second))


def bound(first: Side, second: Side) -> Tensor:
    # Either dot product of a pair (t, s) is off by some sqrt(131) = 12 roundings of |x_t| |x_s| on random data, their
    # product and the sums of a block by another 20; sums over blocks are in float64. All of it relative to what the
    # pairs add up to without cancellation, sum_t |x_t| |dy_t| sum_s |x_s| |dy_s|, of which random dot products reach
    # a tenth: 4 roundings in the place of 40.
    def lengths(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
        rows = x.double().norm(dim=1) * dy.double().norm(dim=1)
        return torch.stack([rows[a:b].sum() for a, b in pairwise(offsets.tolist())])

    u = precision(first[0].dtype)
    relative = 40 * u * grams(first, second).abs()
    return relative + 4 * u * lengths(*first)[:, None] * lengths(*second) if relative.numel() else relative


def call(backend: str, *arguments: Tensor) -> Tensor:
    return ghost_gram(*(a.to(triton_device()) if backend == "triton" else a for a in arguments)).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_with_gradients_formed_in_float64(backend, dtype, monkeypatch):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel leaves float64 to the torch backend (test_triton_ghost.py)")
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for lengths1, lengths2 in PAIRS:
        for inputs, outputs in WIDTHS:
            first, second = ragged(lengths1, inputs, outputs, dtype), ragged(lengths2, inputs, outputs, dtype, seed=1)
            got = call(backend, *first, *second)
            assert got.shape == (len(lengths1), len(lengths2))
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_within(got, grams(first, second), bound(first, second))


@pytest.mark.parametrize("backend", ("cpu", "torch"))
def test_rows_are_taken_in_blocks(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    monkeypatch.setitem(ghost_gram.__globals__, "BLOCK_ROWS", 7)
    first, second = ragged([29, 1, 0, 30], 20, 30), ragged([0, 50, 0, 3, 40], 20, 30, seed=1)
    assert_within(ghost_gram(*first, *second), grams(first, second), bound(first, second))


def test_no_more_than_a_block_of_pairs_is_in_memory(monkeypatch):
    sizes = []
    products = ghost_gram.__globals__["product"]

    def spy(a, b):
        sizes.append(a.shape[0] * b.shape[1])
        return products(a, b)

    monkeypatch.setitem(ghost_gram.__globals__, "product", spy)
    x, dy, offsets = torch.ones(5000, 1), torch.ones(5000, 1), torch.arange(5001)
    assert bool((ghost_gram(x, dy, offsets, x, dy, torch.tensor([0, 5000])) == 5000).all())
    assert max(sizes) == 512 * 2048 and sum(sizes) == 2 * 5000 * 5000


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_as_they_are_and_left_unchanged(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    device = triton_device() if backend == "triton" else "cpu"
    wide, tall = torch.randn(30, 90, device=device), torch.randn(30, 30, device=device)
    offsets1, offsets2 = torch.tensor([0, 11, 11, 30]), torch.tensor([0, 30])
    for x1, dy1, x2, dy2 in [
        (wide[:, 7:37], wide[:, 50:], tall.T, wide[:, :40]),  # rows apart; transposed
        (wide[:, ::3], tall, tall, tall.flip(0)),  # entries apart
        (wide[:1, :5].expand(30, 5), wide[:, :1], wide[:, :5], tall[:, :1]),  # one row for all
    ]:
        before = [t.clone() for t in (x1, dy1, x2, dy2)]
        first, second = (x1.cpu(), dy1.cpu(), offsets1), (x2.cpu(), dy2.cpu(), offsets2)
        got = ghost_gram(x1, dy1, offsets1, x2, dy2, offsets2)
        assert_within(got.cpu(), grams(first, second), bound(first, second))
        assert all(torch.equal(a, b) for a, b in zip((x1, dy1, x2, dy2), before, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("backend", ("cpu", "torch", "triton"))
def test_nan_reaches_the_pairs_of_its_samples_alone(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    first, second = ragged([6, 4, 70], 33, 20), ragged([5, 80], 33, 20, seed=1)
    first[1][0] = second[1][4] = 1
    first[1][0, 19] = torch.nan
    second[0][4, 0] = torch.nan
    assert call(backend, *first, *second).isfinite().tolist() == [[False, False], [False, True], [False, True]]


def test_zero_rows_of_dy_hide_whatever_stands_in_x():
    first, second = ragged([9, 11], 33, 20), ragged([5, 30], 33, 20, seed=1)
    for x, dy, _ in (first, second):
        dy[::2] = 0
        x[::2] = 1
    want, room = grams(first, second), bound(first, second)
    for x, _, _ in (first, second):
        x[::2] = torch.nan
    assert_within(ghost_gram(*first, *second), want, room)


@pytest.mark.parametrize("backend", ("cpu", "torch", "triton"))
def test_memory_that_was_never_written_does_not_reach_the_result(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    first, second = ragged([70, 33, 0, 150], 37, 41), ragged([140, 0, 2], 37, 41, seed=1)
    want, room, empty = grams(first, second), bound(first, second), torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    assert_within(call(backend, *first, *second), want, room)


@pytest.mark.parametrize("backend", ("cpu", "torch", "triton"))
def test_bits_do_not_depend_on_the_run(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    arguments = *ragged([150, 3], 40, 90), *ragged([40, 77], 40, 90, seed=1)
    assert torch.equal(call(backend, *arguments), call(backend, *arguments))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({0: torch.ones(4, 5)}, ShapeError, r"same I and O; got \[5, 3\] and \[2, 3\]"),
        ({4: torch.ones(6, 2)}, ShapeError, r"got \[2, 3\] and \[2, 2\]"),
        ({1: torch.ones(5, 3)}, ShapeError, r"\[4, 2\] and \[5, 3\]"),
        ({5: torch.tensor([0, 5])}, ShapeError, "from 0 to N = 6; they run from 0 to 5"),
        ({2: torch.tensor([0, 3, 2, 4])}, ShapeError, "must not decrease"),
        ({3: torch.ones(6, 2).half(), 4: torch.ones(6, 3).half()}, DtypeError, "one dtype"),
        ({0: [[1.0]]}, DtypeError, "x1 is a list"),
        ({3: torch.ones(6, 2, device="meta"), 4: torch.ones(6, 3, device="meta")}, DeviceError, "on one device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, error, words):
    arguments = [torch.ones(4, 2), torch.ones(4, 3), torch.tensor([0, 4])]
    arguments += [torch.ones(6, 2), torch.ones(6, 3), torch.tensor([0, 6])]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(error, match=words):
        ghost_gram(*arguments)


@pytest.mark.parametrize("backend", ("cpu", "triton"))
def test_custom_op_and_one_graph(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    device = triton_device() if backend == "triton" else "cpu"
    arguments = [t.to(device) for t in (*ragged([3, 0, 5], 6, 7), *ragged([4], 6, 7))]
    torch.library.opcheck(torch.ops.fillm_kernels.ghost_gram.default, tuple(arguments))
    compiled = torch.compile(lambda *a: ghost_gram(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ghost_gram(*arguments) + 1)


lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(lengths_strategy, lengths_strategy, st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_a_gram_matrix_is_transposed_with_its_sides_and_has_the_norms_on_its_diagonal(a, b, inputs, outputs, seed):
    first, second = ragged(a, inputs, outputs, seed=seed), ragged(b, inputs, outputs, seed=seed + 1)
    assert_within(ghost_gram(*second, *first).T, ghost_gram(*first, *second), 2 * bound(first, second))
    norms = ghost_norm(*first).double()
    assert_within(
        ghost_gram(*first, *first).diagonal(), norms, 2 * bound(first, first).diagonal() + 40 * 2**-24 * norms
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8).filter(sum), st.sampled_from([64, 128]))
def test_pieces_partition_the_rows_by_sample_and_by_tile(lengths, block):
    plan = pytest.importorskip("fillm_kernels.triton.ghost_gram").plan
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    pieces, tiles, samples = plan(tuple(offsets.tolist()), block)
    assert pieces[0] == 0 and pieces[-1] == offsets[-1] and bool((pieces.diff() > 0).all())
    assert torch.equal(pieces[samples], offsets)
    assert torch.equal(pieces[tiles][:-1], torch.arange(0, int(offsets[-1]), block))
    assert tiles[-1] == len(pieces) - 1
