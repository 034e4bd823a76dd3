"""Which backend runs an op on a device, and in words why another one does not."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fillm_kernels import native
from fillm_kernels.errors import BackendError
from fillm_kernels.self_check import SelfChecks

VARIABLE = "FILLM_BACKEND"
# Fastest first; "reference", the oracle of the tests, runs when forced, or where an op has nothing else on a device.
PREFERENCE = ("cpu", "cuda", "triton", "torch")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        run: the implementation; it takes what the op takes.
        devices: device types it runs on; empty means any.
        needs_extension: whether it calls into `fillm_kernels._C`.
        needs_cuda: whether it calls into `fillm_kernels._CUDA`.
        needs_triton: whether it launches Triton kernels.
        dtypes: element types it computes in; empty means all the op takes.
        checked_module: module whose `small_case` is compared with the reference at the first call; empty for none.
    """

    run: Callable[..., Any]
    devices: tuple[str, ...] = ()
    needs_extension: bool = False
    needs_cuda: bool = False
    needs_triton: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    checked_module: str = ""

    def refusal(self, device: str) -> str | None:
        """Why this backend does not run on a device type, or None if it does."""
        devices = ("cpu",) if self.needs_triton and interpreted() else self.devices
        if devices and device not in devices:
            return f"runs on {', '.join(devices)} tensors only, not on {device}"
        if self.needs_triton and importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install 'triton>=3.6'"
        if self.needs_cuda:
            return native.cuda_refusal()
        return native.refusal if self.needs_extension else None

    def limit(self) -> str | None:
        """Element types it is confined to, in words, or None."""
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"computes in {names} only; the next backend takes the rest" if names else None


MATRIX_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # what Triton kernels of products compute in


def triton_backend(module: str, dtypes: tuple[torch.dtype, ...] = MATRIX_TYPES) -> Backend:
    """The Triton backend of an op: `launch` of `fillm_kernels.triton.<module>`, imported at the first call.

    It runs on CUDA tensors, and on CPU tensors (when forced) under Triton's interpreter. The first call on a device
    compares `launch` with the op's reference on the module's `small_case`, where it has one.
    """
    path = f"fillm_kernels.triton.{module}"

    def run(*args: Any) -> Any:
        return importlib.import_module(path).launch(*args)

    return Backend(run, devices=("cuda",), needs_triton=True, dtypes=dtypes, checked_module=path)


def cuda_backend(module: str) -> Backend:
    """The CUDA C++ backend of an op: `launch` of `fillm_kernels.cuda.<module>`, imported at the first call.

    The first call on a device compares `launch` with the op's reference on the module's `small_case`.
    """
    path = f"fillm_kernels.cuda.{module}"

    def run(*args: Any) -> Any:
        return importlib.import_module(path).launch(*args)

    return Backend(run, devices=("cuda",), needs_cuda=True, checked_module=path)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: only ever for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_registry: dict[str, dict[str, Backend]] = {}
_self_checks = SelfChecks()
_warned = False


def register(op: str, **implementations: Backend) -> None:
    """Enter an op's backends, by name, in the table that `select` and `backends` read."""
    _registry[op] = implementations


def select(
    op: str, device: str | torch.device, dtype: torch.dtype | None = None, unable: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """The implementation that runs `op` on tensors of a device.

    Args:
        op: name of the op.
        device: the tensors' device, or its type.
        dtype: element type the op computes in; None if every backend of the op takes all.
        unable: backends that cannot do what this call asks for, with the reason in words.

    Returns:
        The backend's function. One whose first use has to be checked is checked before it is returned.

    Raises:
        BackendError: if `FILLM_BACKEND` names a backend that the op does not have, that cannot run on the device or
            in the dtype, that is unable, or that failed its self-check.
    """
    device = torch.device(device)
    name = _choose(op, device, dtype, True, unable or {})
    if native.refusal and name != "cpu" and device.type == "cpu" and VARIABLE not in os.environ:
        _warn_once()
    return _registry[op][name].run


def select_each(op: str, tensors: Sequence[torch.Tensor]) -> list[Callable[..., Any]]:
    """The implementation that runs `op` on each of several tensors of one device, as `select` gives it."""
    by_dtype = {dtype: select(op, tensors[0].device, dtype) for dtype in dict.fromkeys(t.dtype for t in tensors)}
    return [by_dtype[tensor.dtype] for tensor in tensors]


def backends() -> dict[str, dict[str, Any]]:
    """What each op runs on, as plain data fit for a log.

    Returns:
        By op: `available` (backends that can run here, by name), `used` (backend by device type, an explanation where
        there is none), `refused` (why, by name of the backend, for those that cannot run on the CPU here or failed
        their self-check), `limits` (in words, by name, for those confined to some element types), and
        `instruction_sets` of the compiled extension, slowest first.
    """
    report = {}
    for op, implementations in _registry.items():
        refused = {name: reason for name, backend in implementations.items() if (reason := _refusal_in_full(backend))}
        refused |= {name: reason for name in implementations if (reason := _self_checks.failure(op, name))}
        used = {}
        for device in DEVICES:
            try:
                used[device] = _choose(op, torch.device(device), None, False, {})
            except BackendError as error:
                used[device] = str(error)
        report[op] = {
            "available": [name for name in implementations if name not in refused],
            "used": used,
            "refused": refused,
            "limits": {name: limit for name, backend in implementations.items() if (limit := backend.limit())},
            "instruction_sets": native.instruction_sets(),
        }
    return report


def _refusal_in_full(backend: Backend) -> str | None:
    """Why a backend does not run on the CPU, and if it is made for CUDA tensors alone, why it does not run there."""
    reason, elsewhere = backend.refusal("cpu"), backend.refusal("cuda") if backend.devices == ("cuda",) else None
    return f"{reason}; nor there: {elsewhere}" if reason and elsewhere else reason


def _choose(op: str, device: torch.device, dtype: torch.dtype | None, check: bool, unable: Mapping[str, str]) -> str:
    implementations = _registry[op]
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in implementations:
            known = ", ".join(sorted(implementations))
            raise BackendError(f"{VARIABLE}={forced}: {op} has no such backend; it has {known}")
        if reason := unable.get(forced) or _refusal(op, forced, device, dtype, check):
            raise BackendError(f"{VARIABLE}={forced}: {op} cannot use it: {reason}; unset {VARIABLE} or change it")
        return forced
    for name in PREFERENCE:
        # The interpreter is slow: it runs when it is asked for by name.
        usable = name in implementations and name not in unable and not (name == "triton" and interpreted())
        if usable and _refusal(op, name, device, dtype, check) is None:
            return name
    return "reference"


def _refusal(op: str, name: str, device: torch.device, dtype: torch.dtype | None, check: bool) -> str | None:
    """Why a backend does not run an op on a device in a dtype; `check` runs a self-check that is still due."""
    backend = _registry[op][name]
    if reason := backend.refusal(device.type):
        return reason
    if backend.dtypes and dtype is not None and dtype not in backend.dtypes:
        return f"{backend.limit()}; asked for {str(dtype).removeprefix('torch.')}"
    if check and backend.checked_module and "reference" in _registry[op]:
        reference = _registry[op]["reference"].run
        _self_checks.run_if_due(op, name, backend.run, reference, backend.checked_module, device, dtype)
    return _self_checks.failure(op, name)


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fillm_kernels runs on torch's own operators, slower: {native.refusal}; reinstall with a C++ compiler",
            RuntimeWarning,
            stacklevel=3,
        )
