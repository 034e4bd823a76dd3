"""masked_adamw_, masked_sophia_ and masked_norm: what they share, one op beside the other."""

import pytest
import torch
from fillm_kernels import (
    DtypeError,
    Selection,
    ShapeError,
    masked_adamw_,
    masked_norm,
    masked_sophia_,
    native,
    select_bits,
    select_rows,
)
from fillm_kernels.masked_adamw import _cpu as adamw_cpu
from fillm_kernels.masked_adamw import _reference as adamw_reference
from fillm_kernels.masked_norm import _cpu as norm_cpu
from fillm_kernels.masked_sophia import _cpu as sophia_cpu
from fillm_kernels.masked_sophia import _reference as sophia_reference
from fillm_kernels.masked_step import as_factor, as_rate
from fillm_kernels.selection import packed
from fillm_kernels.top_mask import pack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "torch", "triton", "reference")
SHAPES = ((1, 1), (7, 9), (64, 1), (13, 5), (3, 2049), (101, 67))
ADAMW = {"step": 3, "lr": 0.01, "weight_decay": 0.1, "clip": 0.7}
SOPHIA = {"lr": 0.01, "gamma": 0.05, "weight_decay": 0.1, "clip": 0.7}


def masks(shape: tuple[int, int]) -> list[tuple[Selection, Tensor]]:
    """Selections of a tensor, each with the same as booleans: none, all, a few, half, one block, rows."""
    found = []
    entries = shape[0] * shape[1]
    for chosen in (
        torch.zeros(shape, dtype=torch.bool),
        torch.ones(shape, dtype=torch.bool),
        torch.rand(shape) < 0.03,
        torch.rand(shape) < 0.5,
        (torch.arange(entries) // 2048 == 1).view(shape),
    ):
        found.append((select_bits(pack_bits(chosen), entries), chosen))
    rows = (torch.rand(shape[0]) < 0.4).nonzero()[:, 0]
    chosen = torch.zeros(shape, dtype=torch.bool)
    chosen[rows] = True
    return [*found, (select_rows(rows, shape), chosen)]


def numbers(shape: tuple[int, int], dtype: torch.dtype, selection: Selection) -> tuple[Tensor, ...]:
    """Parameter, gradient, estimate and state in mid-training."""
    param, grad, estimate = torch.randn(3, *shape, dtype=torch.float64).to(dtype)
    first, second = selection.new_state(param)
    return param, grad, estimate.square(), first.normal_(), second.uniform_(0.5, 2)


def assert_step(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    # Each formula has at most a dozen roundings of numbers below 8 in size; the parameter is rounded once more to its
    # own type. Divisors are above 1e-3: second moments were drawn from 0.5 to 2, gamma is 0.05.
    arithmetic = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    for g, w in zip(got[1:], want[1:], strict=True):
        assert bool(((g.double() - w.double()).abs() <= 12 * 8 * arithmetic).all())
    ulp = torch.finfo(dtype).eps * want[0].double().abs()
    assert bool(((got[0].double() - want[0].double()).abs() <= ulp + 12 * 8 * arithmetic).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_agree_with_the_formula_in_float64_and_leave_the_rest_alone(backend, dtype, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for shape in SHAPES:
        for selection, chosen in masks(shape):
            for rule in ("adamw", "sophia", "sophia without estimate"):
                param, grad, estimate, first, second = numbers(shape, dtype, selection)
                p, g, m, s = (t.double() for t in (param[chosen], grad[chosen], first.flatten(), second.flatten()))
                grad[~chosen] = estimate[~chosen] = torch.nan
                before, given = param.clone(), grad.clone()
                m = 0.9 * m + 0.1 * 0.7 * g
                if rule == "adamw":
                    s = 0.999 * s + 0.001 * (0.7 * g).square()
                    divisor = (s / (1 - 0.999**3)).sqrt() + 1e-8
                    p = p - 0.01 * 0.1 * p - 0.01 * m / (1 - 0.9**3) / divisor
                    masked_adamw_(param, grad, (first, second), selection, **ADAMW)
                else:
                    fresh = None if rule.endswith("estimate") else estimate
                    if fresh is not None:
                        s = 0.99 * s + 0.01 * estimate[chosen].double()
                    p = p - 0.01 * 0.1 * p - 0.01 * (m / (0.05 * s).clamp(min=1e-12)).clamp(-1, 1)
                    sophia = {**SOPHIA, "betas": (0.9, 0.99), "estimate": fresh}
                    masked_sophia_(param, grad, (first, second), selection, **sophia)
                assert_step((param[chosen], first.flatten(), second.flatten()), (p.to(dtype), m, s), dtype)
                assert torch.equal(param[~chosen], before[~chosen])
                assert torch.equal(grad[chosen], given[chosen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_instruction_set_of_this_processor(instruction_set, dtype):
    scalars = [0.999, 0.9, 0.99, 0.01, 0.5, 1e-8]
    for shape in SHAPES:
        for selection, chosen in masks(shape):
            places = selection.places()
            param, grad, estimate, first, second = numbers(shape, dtype, selection)
            clip = as_factor(0.7, param)
            for own, reference, extra in [
                (adamw_cpu, adamw_reference, ()),
                (sophia_cpu, sophia_reference, (estimate,)),
            ]:
                got = [t.clone() for t in (param, first, second)]
                want = [t.clone() for t in (param, first, second)]
                own(got[0], grad, *got[1:], *extra, places, clip, scalars, instruction_set)
                reference(want[0], grad, *want[1:], *extra, places, clip, scalars)
                assert_step(tuple(got), tuple(want), dtype)
            norm = norm_cpu(grad, places, instruction_set=instruction_set)
            torch.testing.assert_close(norm, grad[chosen].double().square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_are_rounded_to_the_nearest_as_torch_rounds(dtype, instruction_set):
    # A step that only decays: the product is a float32, rounded once to the narrow type, over all of its range.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    for decay in (0.7501, 1.0, 1.5, 2.0**-7):
        param, zero = every.clone(), torch.zeros_like(every)
        selection = select_bits(torch.full((8192,), 255, dtype=torch.uint8), 1 << 16)
        first, second = selection.new_state(param)
        scalars = [decay, 0.9, 0.99, 0.01, 1.0, 1e-8]
        adamw_cpu(param, zero, first, second, selection.places(), as_factor(1.0, param), scalars, instruction_set)
        want = (every.float() * torch.tensor(decay)).to(dtype)
        nan = want.isnan()
        assert torch.equal(param.isnan(), nan)
        # -0 - 0 is -0, but a fused -0 * decay - 0 may be +0: equal as numbers is enough.
        assert torch.equal(param[~nan], want[~nan])


@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw_is_that_of_torch_on_all_weights_and_on_gathered_ones(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for selection, chosen in masks((29, 83)):
        param = torch.randn(29, 83)
        gathered = torch.nn.Parameter(param[chosen].clone())
        optimiser = torch.optim.AdamW([gathered], lr=3e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.2)
        state = selection.new_state(param)
        for step in range(1, 6):
            grad = torch.randn(29, 83)
            gathered.grad = grad[chosen].clone()
            optimiser.step()
            kwargs = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.2}
            masked_adamw_(param, grad, state, selection, step=step, **kwargs)
        # Five steps of a dozen roundings each, of parameters below 8.
        torch.testing.assert_close(param[chosen], gathered.detach(), rtol=0, atol=5 * 12 * 8 * 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_counts_masked_weights_alone(backend, dtype, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    grads, selections, wanted = [], [], 0.0
    for shape in SHAPES:
        for selection, chosen in masks(shape):
            grad = torch.randn(shape).to(dtype)
            wanted += float(grad[chosen].double().square().sum())
            grad[~chosen] = torch.nan
            grads.append(grad)
            selections.append(selection)
    got = masked_norm(grads, selections)
    assert got.dtype == torch.float64
    assert abs(float(got) - wanted**0.5) <= 1e-12 * wanted**0.5  # float64 sums of some thousand squares
    assert float(masked_norm(grads[0], selections[0])) == 0.0
    grads[1][0, 0] = torch.nan
    assert bool(masked_norm(grads[1], selections[1]).isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_come_as_bits_or_rows_and_gradients_in_any_strides(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    rows, chosen = torch.tensor([0, 4, 5]), torch.zeros(6, 10, dtype=torch.bool)
    chosen[rows] = True
    grad = torch.randn(10, 6).T
    results = []
    for mask in (rows, rows.numpy(), pack_bits(chosen), select_rows(rows, (6, 10))):
        param, state = torch.ones(6, 10), (torch.zeros(30), torch.zeros(30))
        masked_adamw_(param, grad, state, mask, step=1, clip=torch.tensor(0.5))
        results.append((param, *state, masked_norm(grad, mask)))
    for result in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(result, results[0], strict=True))
    leaf = torch.nn.Parameter(torch.ones(6, 10))
    masked_adamw_(leaf, grad, (torch.zeros(30), torch.zeros(30)), rows, step=1, clip=0.5)
    assert torch.allclose(leaf.detach(), results[0][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_sophia_lets_nan_through_and_divides_by_eps_at_least(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    param, grad = torch.zeros(4), torch.tensor([torch.nan, 1.0, -1e-30, 0.0])
    state = (torch.zeros(4), torch.zeros(4))
    masked_sophia_(param, grad, state, torch.tensor([15], dtype=torch.uint8), lr=0.5, betas=(0.0, 0.9), eps=1e-12)
    assert bool(param[0].isnan())
    assert param[1:].tolist() == pytest.approx([-0.5, 0.5e-18, 0.0], rel=1e-5)


def test_bits_do_not_depend_on_threads():
    selection = select_bits(pack_bits(torch.rand(300_000) < 0.2), 300_000)
    before, results = torch.get_num_threads(), []
    param, grad = torch.randn(2, 300_000)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own, state = param.clone(), selection.new_state(param)
            masked_adamw_(own, grad, state, selection, step=1)
            results.append((own, *state, masked_norm(grad, selection)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_prefix_counts_say_where_the_state_of_a_block_begins():
    chosen = torch.rand(3 * 2048 + 5) < 0.3
    selection = select_bits(pack_bits(chosen), len(chosen))
    assert selection.starts.tolist() == [int(chosen[: 2048 * b].sum()) for b in range(4)] + [int(chosen.sum())]
    assert selection.count == int(chosen.sum())


def test_arguments_that_do_not_fit_are_refused():
    x, bits = torch.ones(4, 5), torch.full((3,), 1, dtype=torch.uint8)
    state = (torch.zeros(3), torch.zeros(3))
    for call, error, words in [
        (lambda: select_bits(bits, 25), ShapeError, r"bits of 25 weights must be \[4\]"),
        (lambda: select_bits(bits + 254, 20), ShapeError, "past weight 20 must be 0; the last byte is 255"),
        (lambda: select_bits(bits.int(), 20), DtypeError, "uint8"),
        (lambda: select_rows(torch.tensor([0, 0]), (4, 5)), ShapeError, "ascend without repeats from 0 to 3"),
        (lambda: select_rows(torch.tensor([4]), (4, 5)), ShapeError, "from 0 to 3"),
        (lambda: select_rows(torch.tensor([1.0]), (4, 5)), DtypeError, "int64"),
        (lambda: masked_adamw_(x, x, state, bits, step=0), ShapeError, "counts from 1"),
        (lambda: masked_adamw_(x, x.T, state, bits, step=1), ShapeError, r"\[4, 5\] as param; got \[5, 4\]"),
        (lambda: masked_adamw_(x.T, x.T, state, bits, step=1), ShapeError, "contiguous"),
        (lambda: masked_adamw_(x, x.double(), state, bits, step=1), DtypeError, "float64"),
        (lambda: masked_adamw_(x, x, (state[0], torch.zeros(4)), bits, step=1), ShapeError, "each of 3 selected"),
        (lambda: masked_adamw_(x, x, (state[0], state[1].half()), bits, step=1), DtypeError, "state must be"),
        (lambda: masked_sophia_(x, x, state, bits, estimate=x[:3]), ShapeError, "estimate"),
        (lambda: masked_sophia_(x.int(), x, state, bits), DtypeError, "param must be"),
        (lambda: masked_norm(x, select_rows(torch.tensor([1]), (5, 4))), ShapeError, "20 weights, 4 a row"),
        (lambda: masked_norm(torch.ones(3), select_bits(bits, 20)), ShapeError, "one of 20 weights"),
        (lambda: masked_norm(x.int(), bits), DtypeError, "int32"),
        (lambda: masked_norm([x], [bits, bits]), ShapeError, "same length"),
    ]:
        with pytest.raises(error, match=words):
            call()


def test_custom_ops_are_registered_as_torch_expects():
    ops = torch.ops.fillm_kernels
    for selection, _ in masks((7, 9))[2::3]:
        param, grad, estimate, first, second = numbers((7, 9), torch.bfloat16, selection)
        factors, scalars = (as_factor(1.0, param), as_rate(0.01)), [0.99, 0.9, 0.99, 1e-8]
        other = [tensor.clone() for tensor in (param, grad, first, second)]
        step = [[one, two] for one, two in zip((param, grad, first, second), other, strict=True)]
        step += packed([selection, selection])
        torch.library.opcheck(ops.masked_squares.default, (step[1], *step[4:]))
        torch.library.opcheck(ops.masked_adamw_.default, (*step, *factors, 3, scalars))
        for estimates in ([], [estimate, estimate]):
            arguments = (*step, estimates, *factors, [*scalars, 1.0])
            torch.library.opcheck(ops.masked_sophia_.default, arguments)


def test_compiles_as_one_graph():
    selection = masks((7, 9))[3][0]
    param, grad, estimate, first, second = numbers((7, 9), torch.float32, selection)

    def train(param, grad, estimate, first, second):
        clip = (1.0 / (masked_norm(grad, selection) + 1e-6)).clamp(max=1)
        masked_adamw_(param, grad, (first, second), selection, step=2, clip=clip)
        masked_sophia_(param, grad, (first, second), selection, estimate=estimate, clip=clip)
        return param + 1

    one, other = [[t.clone() for t in (param, grad, estimate, first, second)] for _ in range(2)]
    torch.testing.assert_close(
        torch.compile(train, fullgraph=True, backend="aot_eager")(*one), train(*other), rtol=0, atol=0
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1), st.integers(0, 99))
def test_a_step_on_a_mask_is_the_step_on_all_where_the_mask_is_set(entries, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(entries, generator=generator) < fraction
    param, grad = torch.randn(2, entries, generator=generator)
    whole = select_bits(pack_bits(torch.ones(entries, dtype=torch.bool)), entries)
    part = select_bits(pack_bits(chosen), entries)
    full, masked = param.clone(), param.clone()
    states = whole.new_state(param), part.new_state(param)
    masked_adamw_(full, grad, states[0], whole, step=1)
    masked_adamw_(masked, grad, states[1], part, step=1)
    assert torch.equal(masked, torch.where(chosen, full, param))
    assert torch.equal(states[1][1], states[0][1][chosen])


def test_one_graph_serves_every_step_of_a_schedule():
    """The limit of torch.compile, eight graphs, is an error where a whole graph is asked for."""
    selection = masks((7, 9))[3][0]
    param, grad, _, first, second = numbers((7, 9), torch.float32, selection)

    def train(param, grad, first, second, step, lr):
        masked_adamw_(param, grad, (first, second), selection, step=step, lr=lr)
        masked_sophia_(param, grad, (first, second), selection, lr=lr)

    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    one, other = [[t.clone() for t in (param, grad, first, second)] for _ in range(2)]
    for step in range(1, 13):
        lr = torch.tensor(0.1 / step)
        compiled(*one, step, lr)
        train(*other, step, lr.item())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("step", [lambda *a, **k: masked_adamw_(*a, step=1, **k), masked_sophia_])
@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, 1.1)}, "betas"),
        ({"betas": (torch.nan, 0.9)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": torch.nan}, "weight_decay"),
        ({"lr": -0.1}, "lr must not be negative"),
        ({"lr": torch.tensor(torch.nan)}, "lr must not be negative"),
    ],
)
def test_rates_out_of_range_are_refused_and_nothing_is_changed(step, rates, words):
    param, bits = torch.ones(8), torch.tensor([255], dtype=torch.uint8)
    state = select_bits(bits, 8).new_state(param)
    with pytest.raises(ShapeError, match=words):
        step(param, torch.ones(8), state, bits, **rates)
    assert bool((param == 1).all()) and not state[0].any()
