"""The Triton kernels of ghost_norm, ghost_dot and weighted_outer_ (those of ghost_gram: test_ghost_gram.py)."""

from bisect import bisect_right

import pytest
import torch
from fillm_kernels import BackendError, backends, dispatch, ghost_dot, ghost_norm, weighted_outer_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ragged import assert_within, gradients, magnitudes, ragged, triton_device

triton_norm = pytest.importorskip("fillm_kernels.triton.ghost_norm")
tables_to_device = pytest.importorskip("fillm_kernels.triton.tiles").tables_to_device
triton_outer = pytest.importorskip("fillm_kernels.triton.weighted_outer")

DEVICE = triton_device()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Several samples in a tile, a full tile, one row more, several tiles; none, and only empty ones.
LENGTHS = ([0, 1, 2, 5, 0, 63, 64, 65], [131, 1, 0, 3], [17] * 8, [0, 0], [], [200])
WIDTHS = ((1, 1), (63, 65), (64, 64), (131, 96))
U = 2.0**-24  # float32: bfloat16 and float16 products are exact in it


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "triton")


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def norm_bound(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    # A dot product of n terms is off by at most n u sum|a_i b_i|; on random data by some sqrt(n) of these roundings, 12
    # for the widths here. Either factor of a pair carries that, the sum over the pairs of a tile another 14 (levels of
    # its tree): 40 u relative where pairs add up, and relative to (sum_t |x_t| |dy_t|)^2 / 10 where they cancel.
    return 40 * U * gradients(x, dy, offsets).square().sum((1, 2)) + 4 * U * magnitudes(x, dy, offsets) ** 2


def dot_bound(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    # Two nested sums, of at most 131 terms each, of products that do not exceed sum_t |dy_t|' |v| |x_t|.
    return 32 * U * torch.einsum("boi,oi->b", gradients(x.abs(), dy.abs(), offsets), v.abs().double())


def outer_bound(out: Tensor, x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    # One dot product over at most 200 rows, weighted and added: under 32 roundings of the sum of magnitudes.
    weights = torch.ones(len(offsets) - 1) if weights is None else weights.abs()
    terms = torch.einsum("b,boi->oi", weights.double(), gradients(x.abs(), dy.abs(), offsets))
    return 32 * U * (out.abs().double() + terms)


@pytest.mark.parametrize("form", ["auto", "gram", "explicit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_agree_with_gradients_formed_in_float64(dtype, form):
    for lengths in LENGTHS:
        for inputs, outputs in WIDTHS:
            x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
            got = ghost_norm(*on_device(x, dy), offsets, form=form)
            assert got.shape == (len(lengths),) and got.dtype == torch.float32 and got.device.type == DEVICE
            want = gradients(x, dy, offsets).square().sum((1, 2))
            assert_within(got.cpu(), want, norm_bound(x, dy, offsets))


@pytest.mark.parametrize("v_dtype", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dots_agree_with_gradients_formed_in_float64(dtype, v_dtype):
    for lengths in LENGTHS:
        for inputs, outputs in WIDTHS:
            x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
            v = torch.randn(outputs, inputs).to(v_dtype or dtype)
            got = ghost_dot(*on_device(x, dy, v), offsets)
            assert got.shape == (len(lengths),) and got.dtype == torch.float32
            want = torch.einsum("boi,oi->b", gradients(x, dy, offsets), v.double())
            assert_within(got.cpu(), want, dot_bound(x, dy, v, offsets))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_sums_agree_with_gradients_formed_in_float64(dtype, weighted):
    for lengths in LENGTHS:
        for inputs, outputs in WIDTHS:
            x, dy, offsets = ragged(lengths, inputs, outputs, dtype)
            weights = torch.randn(len(lengths)) if weighted else None
            out = torch.randn(outputs, inputs)
            factors = torch.ones(len(lengths)) if weights is None else weights
            want = out.double() - 0.5 * torch.einsum("b,boi->oi", factors.double(), gradients(x, dy, offsets))
            got = out.to(DEVICE, copy=True)
            moved = None if weights is None else weights.to(DEVICE)
            assert weighted_outer_(got, *on_device(x, dy), moved, offsets, alpha=-0.5) is got
            assert_within(got.cpu(), want, outer_bound(out, x, dy, weights, offsets))


def test_float32_v_beside_bfloat16_rows_keeps_all_its_digits():
    # One bfloat16 rounding of v would be off by 2^-9, two by 2^-17; the dot is one product here, so nothing averages.
    x, dy, offsets = torch.ones(1, 16).bfloat16(), torch.ones(1, 16).bfloat16(), torch.tensor([0, 1])
    v = torch.zeros(16, 16)
    for value in (1 + 2.0**-23, -1.2345678, 3.0e-30, 1e30):
        v[3, 4] = value
        assert ghost_dot(*on_device(x, dy, v), offsets).item() == v[3, 4].item()


def test_strided_inputs_are_read_as_they_are_and_left_unchanged():
    wide, tall = on_device(torch.randn(30, 90), torch.randn(33, 60))
    offsets, v = torch.tensor([0, 11, 11, 30]), torch.randn(90, 90, device=DEVICE)
    for x, dy in [
        (wide[:, 7:50], wide[:, 50:]),  # rows apart
        (wide[:, ::3], tall.T[:30]),  # entries apart, transposed
        (wide[:1].expand(30, 90), wide[:, :5]),  # one row for all
    ]:
        before, matrix = (x.clone(), dy.clone()), v[: dy.shape[1], : x.shape[1]]
        host = x.cpu(), dy.cpu(), offsets
        norms = gradients(*host).square().sum((1, 2))
        assert_within(ghost_norm(x, dy, offsets).cpu(), norms, norm_bound(*host))
        for m in (matrix, matrix.T.contiguous().T):
            want = torch.einsum("boi,oi->b", gradients(*host), m.cpu().double())
            assert_within(ghost_dot(x, dy, m, offsets).cpu(), want, dot_bound(*host[:2], m.cpu(), offsets))
        out, zero = torch.zeros_like(matrix), torch.zeros(dy.shape[1], x.shape[1])
        weighted_outer_(out, x, dy, None, offsets)
        assert_within(out.cpu(), gradients(*host).sum(0), outer_bound(zero, *host[:2], None, offsets))
        assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_views_are_added_to_in_place_and_nothing_beside_them(weighted):
    x, dy, offsets = ragged([5, 0, 9], 6, 4)
    weights = torch.randn(3) if weighted else None
    factors = weights if weighted else torch.ones(3)
    for make in (
        lambda room: room.new_zeros(6, 4).T,  # a Conv1D accumulator
        lambda room: room[1, :4, :6],  # one expert of several
        lambda room: room[:, :, 3].T[:4, :6],  # every stride odd
        lambda room: room[2, :4, ::2],  # entries apart
    ):
        room = torch.randn(8, 9, 12).to(DEVICE)
        out, untouched = make(room), room.clone()
        before = out.cpu().clone()
        want = before + torch.einsum("b,boi->oi", factors.double(), gradients(x, dy, offsets))
        weighted_outer_(out, *on_device(x, dy), weights.to(DEVICE) if weighted else None, offsets)
        assert_within(out.cpu(), want, outer_bound(before, x, dy, weights, offsets))
        make(untouched).copy_(out)
        assert torch.equal(room, untouched)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("form", ["gram", "explicit"])
def test_nan_and_infinity_reach_the_result_of_their_sample_alone(form):
    x, dy, offsets = ragged([6, 4, 5, 70, 70], 33, 20)
    dy[0, 19] = torch.nan
    x[11] = torch.inf
    dy[11] = 1
    x[-1, 0] = torch.nan
    dy[-1] = 1
    expected = [False, True, False, True, False]
    assert ghost_norm(*on_device(x, dy), offsets, form=form).isfinite().tolist() == expected
    v = torch.ones(20, 33)
    assert ghost_dot(*on_device(x, dy, v), offsets).isfinite().tolist() == expected


def test_memory_that_was_never_written_does_not_reach_the_result(monkeypatch):
    x, dy, offsets = ragged([70, 33, 0, 150], 37, 41)
    v = torch.randn(41, 37)
    want = gradients(x, dy, offsets)
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *size, **options: empty(*size, **options).fill_(
            -1 << 62 if options.get("dtype") == torch.int64 else torch.nan
        ),
    )
    for form in ("gram", "explicit"):
        got = ghost_norm(*on_device(x, dy), offsets, form=form).cpu()
        assert_within(got, want.square().sum((1, 2)), norm_bound(x, dy, offsets))
    got = ghost_dot(*on_device(x, dy, v), offsets).cpu()
    assert_within(got, torch.einsum("boi,oi->b", want, v.double()), dot_bound(x, dy, v, offsets))


def test_bits_do_not_depend_on_the_run():
    x, dy, v = on_device(*ragged([150, 3, 40, 77], 150, 90, torch.bfloat16)[:2], torch.randn(90, 150))
    offsets = torch.tensor([0, 150, 153, 193, 270])
    assert torch.equal(ghost_norm(x, dy, offsets), ghost_norm(x, dy, offsets))
    assert torch.equal(ghost_dot(x, dy, v, offsets), ghost_dot(x, dy, v, offsets))
    sums = [weighted_outer_(torch.zeros_like(v), x, dy, None, offsets) for _ in range(2)]
    assert torch.equal(*sums)


def test_float64_runs_on_the_next_backend_and_the_report_says_so(monkeypatch):
    x, dy, offsets = ragged([3, 4], 5, 6, torch.float64)
    with pytest.raises(BackendError, match="computes in float32, bfloat16, float16 only; .* asked for float64"):
        ghost_norm(*on_device(x, dy), offsets)
    with pytest.raises(BackendError, match="asked for float64"):
        weighted_outer_(
            torch.zeros(6, 5, dtype=torch.float64).to(DEVICE), *on_device(x.float(), dy.float()), None, offsets
        )
    assert "float32, bfloat16, float16 only" in backends()["ghost_norm"]["limits"]["triton"]
    monkeypatch.delenv("FILLM_BACKEND")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op in ("ghost_norm", "ghost_dot", "ghost_gram", "weighted_outer_"):
        table = dispatch._registry[op]
        assert dispatch.select(op, "cuda", torch.float64) is table["torch"].run
        assert backends()[op]["used"]["cuda"] == "triton"


def test_custom_ops_and_one_graph():
    x, dy, offsets = ragged([3, 0, 5], 6, 7)
    v, (x, dy) = torch.randn(7, 6).to(DEVICE), on_device(x, dy)
    torch.library.opcheck(torch.ops.fillm_kernels.ghost_norm.default, (x, dy, offsets, "auto"))
    torch.library.opcheck(torch.ops.fillm_kernels.ghost_dot.default, (x, dy, v, offsets))
    arguments = (torch.zeros_like(v), x, dy, torch.ones(3, device=DEVICE), offsets, 0.5)
    torch.library.opcheck(torch.ops.fillm_kernels.weighted_outer_.default, arguments)
    compiled = torch.compile(lambda *a: ghost_norm(*a).sqrt() + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, dy, offsets), ghost_norm(x, dy, offsets).sqrt() + 1)


def test_tables_travel_together_and_arrive_as_they_were():
    tables = [torch.arange(3), torch.empty(0, 7, dtype=torch.int64), torch.arange(10).view(5, 2), torch.tensor([9])]
    moved = tables_to_device(tables, torch.device(DEVICE))
    for table, arrived in zip(tables, moved, strict=True):
        assert arrived.shape == table.shape and torch.equal(arrived.cpu(), table)
        assert arrived.data_ptr() % 16 == 0 and arrived.is_contiguous()
    assert len({arrived.untyped_storage().data_ptr() for arrived in moved}) == 1


def launched(monkeypatch, module, *names) -> list[tuple]:
    """Record (kernel, configuration, constants) of every launch from a module."""
    record, launch = [], module.launch_kernel

    def spy(kernel, programs, configuration, *arguments, **constants):
        if programs:
            record.append((kernel, configuration, constants))
        launch(kernel, programs, configuration, *arguments, **constants)

    monkeypatch.setattr(module, "launch_kernel", spy)
    return record


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_launched_is_what_the_compile_check_compiles(dtype, monkeypatch):
    from fillm_kernels.triton import ghost_dot as triton_dot

    records = {module: launched(monkeypatch, module) for module in (triton_norm, triton_dot, triton_outer)}
    for inputs, outputs in ((32, 48), (33, 48)):
        x, dy, offsets = ragged([70, 3], inputs, outputs, dtype)
        x, dy = on_device(x, dy)
        for form in ("gram", "explicit"):
            ghost_norm(x, dy, offsets, form=form)
        for v_dtype in (dtype, torch.float32):
            ghost_dot(x, dy, torch.ones(outputs, inputs, device=DEVICE).to(v_dtype), offsets)
        for weights in (None, torch.ones(2, device=DEVICE)):
            weighted_outer_(torch.ones(outputs, inputs, device=DEVICE), x, dy, weights, offsets)
    for module, record in records.items():
        cases = [(case.kernel, case.configuration, dict(case.constants)) for case in module.compile_cases()]
        for case in cases:
            case[2].pop("out_column_stride", None)
            case[2].pop("WIDEN")
        assert len(record) >= 4
        for kernel, configuration, constants in record:
            constants.pop("WIDEN")
            assert (kernel, configuration, constants) in cases


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 300), max_size=8),
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from(["auto", "gram", "explicit"]),
)
def test_work_items_cover_every_pair_of_rows_of_a_sample_once(lengths, inputs, outputs, form):
    bounds = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())
    packed, same, paired, explicit, shares = triton_norm.plan(bounds, inputs, outputs, form, 128, 128)
    assert torch.equal(same[:, :2], same[:, 2:4]) and not bool((paired[:, 0] == paired[:, 2]).any())
    paired = torch.cat([same, paired])
    blocks = -(-inputs // 128) * -(-outputs // 128)
    covered = torch.zeros(bounds[-1], bounds[-1], dtype=torch.int64)
    taken = torch.zeros(int(shares[-1]), dtype=torch.int64)
    assert bool((packed[:, 1] - packed[:, 0] <= triton_norm.PACKED_ROWS).all())
    assert bool((paired[:, [1, 3]] - paired[:, [0, 2]] <= 128).all())
    for left, left_end, right, right_end, first, last, share in [*packed.tolist(), *paired.tolist()]:
        for sample in range(first, last):
            rows = slice(max(left, bounds[sample]), min(left_end, bounds[sample + 1]))
            columns = slice(max(right, bounds[sample]), min(right_end, bounds[sample + 1]))
            covered[rows, columns] += 1
            if left != right:
                covered[columns, rows] += 1
            slot = share + sample - first
            assert shares[sample] <= slot < shares[sample + 1]
            taken[slot] += 1
    for begin, end, share in explicit.tolist():
        covered[begin:end, begin:end] += 1
        assert share == shares[bisect_right(bounds, begin) - 1]  # the last that begins there; those before are empty
        taken[share : share + blocks] += 1
    own = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    assert torch.equal(covered, (own[:, None] == own[None, :]).long())
    assert bool((taken == 1).all())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=4), st.integers(-20, 20), st.integers(0, 99))
def test_scaling_dy_by_a_power_of_two_scales_every_result_to_the_bit(lengths, exponent, seed):
    x, dy, offsets = ragged(lengths, 19, 23, seed=seed)
    x, dy, v = on_device(x, dy, torch.ones(23, 19))
    factor = 2.0**exponent
    assert torch.equal(ghost_norm(x, dy * factor, offsets), ghost_norm(x, dy, offsets) * factor**2)
    assert torch.equal(ghost_dot(x, dy * factor, v, offsets), ghost_dot(x, dy, v, offsets) * factor)
