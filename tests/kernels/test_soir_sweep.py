import pytest
import torch
from fillm_kernels import DtypeError, ShapeError, SoirSweep, native, soir_sweep
from fillm_kernels.soir_sweep import _cpu, _reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "torch", "triton", "reference")
SHAPES = ((1, 1), (3, 63), (64, 65), (67, 64), (5, 4099), (0, 7))  # n, k


def store(tensors: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sketches [L, n, k], forget sketch [L, k], exact squared norms [L, n] that differ from the sketches' own."""
    s = torch.randn(tensors, n, k, dtype=torch.float64).to(dtype)
    v = torch.randn(tensors, k, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return s, v, s.double().square().sum(2) * (0.5 + torch.rand(tensors, n))


def formed(s: Tensor, v: Tensor, q: Tensor, damping: float, numel: int) -> dict[str, Tensor]:
    """(1) to (3) for one tensor, u formed outright in float64."""
    s, v, q = s.double(), v.double(), q.double()
    lam = damping * q.mean() / numel
    dots = torch.einsum("nk,k->n", s, v)
    c = dots / (lam + q)
    w = torch.einsum("n,nk->k", c, s)
    u = -(v - w / len(q)) / lam
    return {
        "dots": dots,
        "weighted": w,
        "damping": lam,
        "cross": (c * dots).mean(),
        "score": u.norm(),
        "gain": -(v @ u),
    }


def assert_close(got: SoirSweep, s: Tensor, v: Tensor, q: Tensor, damping: float, numel: int) -> None:
    want = formed(s, v, q, damping, numel)
    roundoff = 2.0**-53 if s.dtype == torch.float64 else 2.0**-24
    # A dot product of k terms in at least four partial sums, and a sum of n weighted rows, lose at most
    # sqrt(terms) + 8 roundings on random data, relative to what the terms would add up to without their signs.
    magnitude = s.double().abs() @ v.double().abs()
    lost = roundoff * (s.shape[1] ** 0.5 + 8)
    assert bool(((got.dots.double() - want["dots"]).abs() <= lost * magnitude).all())
    curvature = want["damping"] + q.double()
    terms = (magnitude / curvature) @ s.double().abs()
    lost = lost + roundoff * (s.shape[0] ** 0.5 + 8)
    assert bool(((got.weighted.double() - want["weighted"]).abs() <= lost * terms).all())
    cross = lost * (magnitude.square() / curvature).mean()
    assert float((got.cross - want["cross"]).abs()) <= 2 * cross + 1e-300
    assert float(got.damping) == pytest.approx(float(want["damping"]), rel=1e-12)
    # lambda |u| = |v - w/n| and lambda gain = |v|^2 - S take over what w and S lost.
    lam = float(want["damping"])
    assert abs(float(got.score - want["score"])) * lam <= float((lost * terms / max(1, len(q))).norm()) + 1e-12
    assert abs(float(got.gain - want["gain"])) * lam <= 2 * float(cross) + 1e-12 * float(v.double().square().sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_with_u_formed_in_float64(backend, dtype, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    for n, k in SHAPES[:-1]:
        s, v, q = store(3, n, k, dtype)
        got = soir_sweep(s, v, q, 0.1, numel=[10 * k, k, 3 * k])
        assert got.dots.dtype == got.weighted.dtype == v.dtype
        for t, numel in enumerate((10 * k, k, 3 * k)):
            assert_close(SoirSweep(*(part[t] for part in got)), s[t], v[t], q[t], 0.1, numel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_instruction_set_of_this_processor(instruction_set, dtype):
    for n, k in (*SHAPES, (300, 9001)):  # the last has several parts
        s, v, q = store(2, n, k, dtype)
        got, want = _cpu(s, v, q, 0.1, [k, k], instruction_set), _reference(s, v, q, 0.1, [k, k])
        # As above, for whole vectors: relative to |s_i||v| and to sum_i |c_i||s_i|.
        lost = (2.0**-53 if dtype == torch.float64 else 2.0**-24) * (k**0.5 + n**0.5 + 16)
        lengths = s.double().norm(dim=2) * v.double().norm(dim=1)[:, None]
        assert bool(((got[0].double() - want[0]).abs() <= lost * lengths).all())
        sums = (lengths / q * s.double().norm(dim=2)).sum(1) if n else torch.zeros(2)
        assert bool(((got[1].double() - want[1]).norm(dim=1) <= lost * sums).all())
        torch.testing.assert_close(got[2][:, [0, 3]], want[2][:, [0, 3]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_of_different_sizes_and_single_tensors_give_what_a_stack_gives(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    stores = [store(1, n, k, torch.float32) for n, k in ((5, 70), (5, 70), (9, 3))]
    s, v, q = ([part[0] for part in parts] for parts in zip(*stores, strict=True))
    listed = soir_sweep(s, v, q, 0.2, numel=[100, 200, 300])
    alone = [soir_sweep(*parts, 0.2, numel=size) for *parts, size in zip(s, v, q, (100, 200, 300), strict=True)]
    stacked = soir_sweep(torch.stack(s[:2]), torch.stack(v[:2]), torch.stack(q[:2]), 0.2, numel=[100, 200])
    for one, other in zip(listed, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for t in range(2):
        for a, b in zip(stacked, listed[t], strict=True):
            torch.testing.assert_close(a[t], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_curvature_and_no_samples(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    zero, v = torch.zeros(2, 4, 6), torch.stack([torch.zeros(6), torch.ones(6)])
    for s, q in ((zero, torch.zeros(2, 4)), (zero[:, :0], torch.zeros(2, 0))):
        got = soir_sweep(s, v, q, 0.1)
        assert got.score.tolist() == got.gain.tolist() == [0.0, torch.inf]  # unused; no retain gradient
        assert got.weighted.abs().sum() == got.cross.abs().sum() == got.damping.abs().sum() == 0


def test_exact_norm_of_v_takes_the_place_of_the_sketchs():
    s, v, q = store(2, 20, 50, torch.float64)
    exact = v.norm(dim=1) * torch.tensor([1.1, 0.0])
    plain, got = soir_sweep(s, v, q, 0.1), soir_sweep(s, v, q, 0.1, v_norm=exact)
    more = exact.square() - v.square().sum(1)
    squared = ((plain.score * plain.damping).square() + more).clamp(min=0)
    torch.testing.assert_close(got.score, squared.sqrt() / plain.damping)
    torch.testing.assert_close(got.gain, plain.gain + more / plain.damping)
    assert torch.equal(got.weighted, plain.weighted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_as_they_are_and_left_unchanged(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    room, v, q = torch.randn(30, 40), torch.randn(12), torch.rand(14)
    for s in (room[::2, ::3][:14, :12], room.T[:14, :12], room[:1, :12].expand(14, 12)):
        before = s.clone()
        got, want = soir_sweep(s, v, q, 0.1), soir_sweep(s.contiguous(), v, q, 0.1)
        assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(s, before)


def test_bits_depend_neither_on_threads_nor_on_memory_that_was_never_written(monkeypatch):
    s, v, q = store(2, 700, 5001, torch.float32)  # four parts
    before, empty = torch.get_num_threads(), torch.empty
    try:
        results = []
        for threads, poison in ((1, torch.nan), (2, 1e30), (3, torch.nan)):
            monkeypatch.setattr(torch, "empty", lambda *a, poison=poison, **options: empty(*a, **options).fill_(poison))
            torch.set_num_threads(threads)
            results.append(_cpu(s, v, q, 0.1, [5001, 5001]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_that_is_not_a_number_reaches_its_own_tensor_alone(backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    s, v, q = store(2, 6, 33, torch.float32)
    s[0, 3, 7] = torch.nan
    got = soir_sweep(s, v, q, 0.1)
    assert got.score.isnan().tolist() == got.cross.isnan().tolist() == [True, False]
    assert got.dots.isnan().nonzero().tolist() == [[0, 3]]


def test_arguments_that_do_not_fit_are_refused():
    s, v, q = torch.ones(4, 5), torch.ones(5), torch.ones(4)
    for call, error, words in [
        (lambda: soir_sweep(s[0], v, q, 0.1), ShapeError, r"\[n, k\] or \[L, n, k\]; got \[5\]"),
        (lambda: soir_sweep(s, v[:4], q, 0.1), ShapeError, r"got \[1, 4\], \[1, 4\] and 1"),
        (lambda: soir_sweep(s, v, q[:3], 0.1), ShapeError, r"norms \[L, n\]"),
        (lambda: soir_sweep(s, v, q, 0.1, numel=[1, 2]), ShapeError, "and 2"),
        (lambda: soir_sweep(s, v, q, -0.1), ShapeError, "not be negative"),
        (lambda: soir_sweep(s, v, q, 0.1, numel=0), ShapeError, "numel below 1"),
        (lambda: soir_sweep([s], [v, v], [q], 0.1), ShapeError, "of its length, 1"),
        (lambda: soir_sweep(s.int(), v, q, 0.1), DtypeError, "int32"),
        (lambda: soir_sweep(s, v.half(), q, 0.1), DtypeError, "no narrower than s"),
        (lambda: soir_sweep(s, v, q.half(), 0.1), DtypeError, "norms must be"),
    ]:
        with pytest.raises(error, match=words):
            call()


def test_custom_op_is_registered_as_torch_expects_and_compiles_as_one_graph():
    s, v, q = store(2, 3, 7, torch.bfloat16)
    torch.library.opcheck(torch.ops.fillm_kernels.soir_sweep.default, (s, v, q, 0.1, [70, 70]))
    compiled = torch.compile(lambda *a: soir_sweep(*a, 0.1, numel=70).score + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(s, v, q), soir_sweep(s, v, q, 0.1, numel=70).score + 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(-8, 8), st.integers(0, 99))
def test_scaling_the_forget_gradient_scales_the_score_and_the_bracket_holds(n, k, exponent, seed):
    torch.manual_seed(seed)
    s, v, _ = store(1, n, k, torch.float32)
    q = s[0].double().square().sum(1)
    got = soir_sweep(s[0], v[0], q, 0.1)
    scaled = soir_sweep(s[0], v[0] * 2.0**exponent, q, 0.1)
    assert float(scaled.score) == float(got.score) * 2.0**exponent  # powers of two: to the bit
    norm, lam = float(v.double().norm()), float(got.damping)
    c = got.dots.double() / (got.damping + q)
    spread = float((c.square() * q).mean())
    slack = 1e-5 * norm
    assert norm - float(got.cross) / norm - slack <= lam * float(got.score)  # docs/method.md (3b)
    assert lam * float(got.score) <= max(0.0, norm**2 - 2 * float(got.cross) + spread) ** 0.5 + slack
