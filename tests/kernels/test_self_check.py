import dataclasses
import importlib
import itertools
import pkgutil
import re
import threading
import warnings

import pytest
import torch
from fillm_kernels import BackendError, backends, dispatch, ghost_norm, self_check
from fillm_kernels.selection import Places, select_bits
from fillm_kernels.self_check import SelfChecks
from fillm_kernels.top_mask import pack_bits, unpack_bits

from tests.kernels.ragged import triton_device

triton_norm = pytest.importorskip("fillm_kernels.triton.ghost_norm")
Configuration = importlib.import_module("fillm_kernels.triton.configurations").Configuration
DEVICE = triton_device()
X, OFFSETS = torch.ones(2, 3, device=DEVICE), torch.tensor([0, 2])
OPS = {
    "sketch": "sketch",
    "ghost_norm": "ghost_norm",
    "ghost_dot": "ghost_dot",
    "ghost_gram": "ghost_gram",
    "weighted_outer_": "weighted_outer",
    "sample_moments": "sample_moments",
    "factored_sketch": "factored_sketch",
    "soir_sweep": "soir_sweep",
    "top_mask": "top_mask",
    "masked_norm": "masked_norm",
    "masked_adamw_": "masked_adamw",
    "masked_sophia_": "masked_sophia",
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No check done yet, as in a new process."""
    monkeypatch.setattr(dispatch, "_self_checks", SelfChecks())


@pytest.fixture
def preferred(monkeypatch):
    """Triton first where the tests run it, as it is on a GPU."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "PREFERENCE", ("triton", "cpu", "torch"))
    table = dispatch._registry["ghost_norm"]
    monkeypatch.setitem(table, "triton", dataclasses.replace(table["triton"], devices=(DEVICE,)))


def break_kernel(monkeypatch, change):
    launch = triton_norm.launch
    monkeypatch.setattr(triton_norm, "launch", lambda *arguments: change(launch(*arguments)))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16))],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_passes(op, dtype, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    calls = []
    entry = dispatch._registry[op]["reference"]
    spy = dispatch.Backend(lambda *a, run=entry.run: calls.append(1) or run(*a))
    monkeypatch.setitem(dispatch._registry[op], "reference", spy)
    for _ in range(3):
        assert dispatch.select(op, DEVICE, dtype) is dispatch._registry[op]["triton"].run
    module = importlib.import_module(f"fillm_kernels.triton.{OPS[op]}")
    cases = module.small_case(dtype, torch.device("cpu"))
    assert len(calls) == (len(cases) if isinstance(cases, list) else 1)
    assert dispatch._self_checks.failure(op, "triton") is None


@pytest.mark.slow
def test_the_check_meets_every_kernel_and_every_configuration_of_a_layer(monkeypatch):
    """What it never launched would be believed unseen."""
    package = importlib.import_module("fillm_kernels.triton")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"fillm_kernels.triton.{name}") for name in names]
    met = set()
    for module in modules:
        if launch := vars(module).get("launch_kernel"):

            def spy(kernel, programs, configuration, *arguments, launch=launch, **constants):
                met.update({kernel.fn.__name__, id(configuration)} if programs else ())
                launch(kernel, programs, configuration, *arguments, **constants)

            monkeypatch.setattr(module, "launch_kernel", spy)
    for op, dtype in itertools.product(OPS, (torch.float32, torch.bfloat16)):
        module = importlib.import_module(f"fillm_kernels.triton.{OPS[op]}")
        cases = module.small_case(dtype, torch.device(DEVICE))
        for case in cases if isinstance(cases, list) else [cases]:
            module.launch(*case)
    kernels = {case.kernel.fn.__name__ for module in modules for case in getattr(module, "compile_cases", list)()}
    assert len(kernels) > 20 and kernels <= met
    for name in ("ghost_norm", "ghost_dot", "ghost_gram", "weighted_outer", "sample_moments"):
        own = vars(importlib.import_module(f"fillm_kernels.triton.{name}"))
        missed = [label for label, value in own.items() if isinstance(value, Configuration) and id(value) not in met]
        assert missed == [], name


def test_a_thread_that_comes_during_a_check_waits_for_its_verdict(preferred, monkeypatch):
    inside, launch = threading.Event(), triton_norm.launch
    turned_away = []

    def broken(*arguments):
        inside.set()
        other.join(0.5)  # it ends at once if it does not wait
        return launch(*arguments) * 0

    def come():
        inside.wait()
        turned_away.append(dispatch.select("ghost_norm", DEVICE, torch.float32) is not broken_run)

    broken_run = dispatch._registry["ghost_norm"]["triton"].run
    monkeypatch.setattr(triton_norm, "small_case", lambda *a: (X, X, OFFSETS, "gram"))
    monkeypatch.setattr(triton_norm, "launch", broken)
    other = threading.Thread(target=come)
    other.start()
    with pytest.warns(RuntimeWarning, match="off from the reference"):
        dispatch.select("ghost_norm", DEVICE, torch.float32)
    other.join()
    assert turned_away == [True]


def test_a_kernel_that_is_off_leaves_the_op_to_the_next_backend_with_one_warning(preferred, monkeypatch):
    break_kernel(monkeypatch, lambda norms: norms * 1.001)
    with pytest.warns(
        RuntimeWarning, match="ghost_norm does not use its triton backend; .* off from the reference"
    ) as seen:
        assert ghost_norm(X, X, OFFSETS).tolist() == [36.0]
    assert sum(one.category is RuntimeWarning for one in seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ghost_norm(X, X, OFFSETS).tolist() == [36.0]
    entry = backends()["ghost_norm"]
    expected = r"self-check on \w+(:\d)? in float32: off from the reference by 1.0e-03 relative \(1e-04 allowed\)"
    assert re.fullmatch(expected, entry["refused"]["triton"])
    assert "triton" not in entry["available"]
    assert entry["used"][DEVICE] != "triton"
    assert "self-check" not in backends()["ghost_dot"]["refused"].get("triton", "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda norms: norms * torch.nan, "off from the reference by nan"),
        (lambda norms: norms * 0, "off from the reference by 1.0e+00"),
        (lambda norms: norms[:-1], "RuntimeError: "),
        (lambda norms: norms.missing, "AttributeError: .* has no attribute 'missing'"),
    ],
)
def test_every_kind_of_failure_is_put_in_words(change, words, preferred, monkeypatch):
    break_kernel(monkeypatch, change)
    with pytest.warns(RuntimeWarning, match=words.replace("+", r"\+")):
        assert ghost_norm(X, X, OFFSETS).tolist() == [36.0]


def test_a_kernel_that_is_off_in_one_type_is_not_used_in_any(preferred, monkeypatch):
    launch = triton_norm.launch
    off = lambda x, *rest: launch(x, *rest) * (2 if x.dtype == torch.bfloat16 else 1)  # noqa: E731
    monkeypatch.setattr(triton_norm, "launch", off)
    assert dispatch.select("ghost_norm", DEVICE, torch.float32) is dispatch._registry["ghost_norm"]["triton"].run
    with pytest.warns(RuntimeWarning, match="in bfloat16: off"):
        dispatch.select("ghost_norm", DEVICE, torch.bfloat16)
    assert dispatch.select("ghost_norm", DEVICE, torch.float32) is not dispatch._registry["ghost_norm"]["triton"].run


def test_forced_backend_that_is_off_is_an_error_with_the_figures(monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    break_kernel(monkeypatch, lambda norms: norms * 1.5)
    with (
        pytest.warns(RuntimeWarning, match="off from the reference"),
        pytest.raises(BackendError, match="FILLM_BACKEND=triton: ghost_norm cannot use it: self-check .* relative"),
    ):
        ghost_norm(X, X, OFFSETS)


def test_every_case_of_a_list_is_judged(monkeypatch):
    small, launch = triton_norm.small_case, triton_norm.launch
    monkeypatch.setattr(triton_norm, "small_case", lambda *a: [small(*a)[0], (X, X, OFFSETS, "gram")])
    monkeypatch.setattr(triton_norm, "launch", lambda x, *rest: launch(x, *rest) * (1.5 if x.shape == X.shape else 1))
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    with pytest.warns(RuntimeWarning, match="off from the reference by 5.0e-01"), pytest.raises(BackendError):
        dispatch.select("ghost_norm", DEVICE, torch.float32)


def test_an_op_that_works_in_place_is_judged_by_all_its_tensors():
    kept, other = torch.ones(2), torch.zeros(2)
    assert self_check._results(None, (kept, 3, other)) == [kept, other]
    assert self_check._results((kept, other), (other,)) == [kept, other]
    assert self_check._results(kept, (other,)) == [kept]
    assert self_check._results(([kept], other), ()) == [kept, other]
    assert self_check._results(None, ((kept, None, [2, 3]), "", other)) == [kept, other]


def test_masks_and_counts_must_be_equal_to_the_last_bit():
    bits = torch.full((10**6,), 255, dtype=torch.uint8)
    off = bits.clone()
    off[-1] = 254
    assert self_check._relative_error(bits, bits) == 0
    assert self_check._relative_error(off, bits) == torch.inf


@pytest.mark.parametrize("op", ["top_mask", "masked_norm", "masked_adamw_", "masked_sophia_"])
def test_one_wrong_bit_of_a_mask_is_found(op, monkeypatch):
    """A kernel that takes a weight too many or too few must not hide in rounding."""
    module = importlib.import_module(f"fillm_kernels.triton.{OPS[op]}")
    launch = module.launch

    def one_off(*arguments):
        if op == "top_mask":
            return launch(arguments[0], arguments[1] + 1)
        places = next(part for part in arguments if isinstance(part, Places))
        chosen = unpack_bits(places.bits, places.sizes[0])
        at = int(chosen.nonzero()[-1])
        chosen[at] = False
        fewer = select_bits(pack_bits(chosen), places.sizes[0]).places()
        return launch(*(fewer if part is places else part for part in arguments))

    monkeypatch.setattr(module, "launch", one_off)
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(dispatch, "_self_checks", SelfChecks())
        with pytest.warns(RuntimeWarning, match="off from the reference"), pytest.raises(BackendError):
            dispatch.select(op, DEVICE, dtype)


def test_small_cases_meet_what_they_are_for():
    """Ties past the quota, a negative threshold; blocks without a bit; results that bfloat16 holds exactly."""
    for dtype in (torch.float32, torch.bfloat16):
        scores, budget = importlib.import_module("fillm_kernels.triton.top_mask").small_case(dtype, torch.device("cpu"))
        threshold = torch.cat(scores).sort(descending=True).values[budget - 1]
        assert threshold < 0 and sum(int((tensor >= threshold).sum()) for tensor in scores) > budget
    for op in ("masked_adamw_", "masked_sophia_"):
        module = importlib.import_module(f"fillm_kernels.triton.{OPS[op]}")
        exact, rounded = (module.small_case(dtype, torch.device("cpu")) for dtype in (torch.float64, torch.bfloat16))
        places = next(part for part in exact if isinstance(part, Places))
        assert (places.starts.diff() == 0).any() and places.sizes[0] % 8 != 0
        for arguments in (exact, rounded):
            dispatch._registry[op]["reference"].run(*arguments)
        assert torch.equal(exact[0], rounded[0].double()) and len(exact[0].unique()) > 20


def test_a_module_without_a_small_case_is_not_checked(monkeypatch):
    monkeypatch.delattr(triton_norm, "small_case")
    monkeypatch.setenv("FILLM_BACKEND", "triton")
    break_kernel(monkeypatch, lambda norms: norms * 2)
    assert ghost_norm(X, X, OFFSETS).tolist() == [72.0]


def test_every_module_that_launches_has_a_small_case_and_compile_cases():
    package = importlib.import_module("fillm_kernels.triton")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"fillm_kernels.triton.{name}") for name in names]
    launching = [module for module in modules if hasattr(module, "launch")]
    assert len(launching) >= 10
    for module in launching:
        assert hasattr(module, "small_case") and hasattr(module, "compile_cases"), module.__name__
