"""A test of the backend `cuda` runs its kernels on the CPU; self-checks are left to the tests that are about them."""

from types import ModuleType
from typing import Any

import pytest
from fillm_kernels import dispatch, native
from fillm_kernels.self_check import SelfChecks

from tests.kernels.cuda_host import extension


class Believed(SelfChecks):
    """Takes every kernel for right, as after its self-check."""

    def run_if_due(self, *given: Any, **named: Any) -> None:
        """Checks nothing."""


@pytest.fixture(autouse=True)
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter self-checks take longer than the tests, which hold every kernel to a reference themselves."""
    if dispatch.interpreted():
        monkeypatch.setattr(dispatch, "_self_checks", Believed())


@pytest.fixture
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The `cuda` backend forced, on CPU tensors, on the host build of its kernels."""
    host = extension()
    monkeypatch.setattr(native, "cuda_extension", lambda: host)
    monkeypatch.setattr(native, "cuda_refusal", lambda: None)
    for op in ("sketch", "top_mask"):
        table = dispatch._registry[op]
        backend = table["cuda"]
        on_cpu = dispatch.Backend(backend.run, ("cpu",), needs_cuda=True, checked_module=backend.checked_module)
        monkeypatch.setitem(table, "cuda", on_cpu)
    monkeypatch.setattr(dispatch, "_self_checks", Believed())
    monkeypatch.setenv("FILLM_BACKEND", "cuda")
    return host


@pytest.fixture(autouse=True)
def cuda_where_asked_for(request: pytest.FixtureRequest) -> None:
    """`cuda_on_cpu` for every test with a parameter `backend` that is "cuda"."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "cuda":
        request.getfixturevalue("cuda_on_cpu")
