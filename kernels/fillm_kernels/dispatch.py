"""Which backend runs an op on a device, and in words why another one does not."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fillm_kernels import native
from fillm_kernels.errors import BackendError

VARIABLE = "FILLM_BACKEND"
# Fastest first; "reference", the oracle of the tests, runs when forced, or where an op has nothing else on a device.
PREFERENCE = ("cpu", "triton", "torch")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        run: the implementation; it takes what the op takes.
        devices: device types it runs on; empty means any.
        needs_extension: whether it calls into `fillm_kernels._C`.
        needs_triton: whether it launches Triton kernels.
    """

    run: Callable[..., Any]
    devices: tuple[str, ...] = ()
    needs_extension: bool = False
    needs_triton: bool = False

    def refusal(self, device: str) -> str | None:
        """Why this backend does not run on a device type, or None if it does."""
        devices = ("cpu",) if self.needs_triton and interpreted() else self.devices
        if devices and device not in devices:
            return f"runs on {', '.join(devices)} tensors only, not on {device}"
        if self.needs_triton and importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install 'fillm[gpu]'"
        return native.refusal if self.needs_extension else None


def triton_backend(module: str) -> Backend:
    """The Triton backend of an op: `launch` of `fillm_kernels.triton.<module>`, imported at the first call.

    It runs on CUDA tensors, and on CPU tensors (when forced) under Triton's interpreter.
    """

    def run(*args: Any) -> Any:
        return importlib.import_module(f"fillm_kernels.triton.{module}").launch(*args)

    return Backend(run, devices=("cuda",), needs_triton=True)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: only ever for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_registry: dict[str, dict[str, Backend]] = {}
_warned = False


def register(op: str, **implementations: Backend) -> None:
    """Enter an op's backends, by name, in the table that `select` and `backends` read."""
    _registry[op] = implementations


def select(op: str, device: str) -> Callable[..., Any]:
    """The implementation that runs `op` on tensors of a device type.

    Args:
        op: name of the op.
        device: `tensor.device.type`.

    Returns:
        The backend's function.

    Raises:
        BackendError: if `FILLM_BACKEND` names a backend that the op does not have or that cannot run on the device.
    """
    name = _choose(op, device)
    if name != "cpu" and device == "cpu" and VARIABLE not in os.environ:
        _warn_once()
    return _registry[op][name].run


def backends() -> dict[str, dict[str, Any]]:
    """What each op runs on, as plain data fit for a log.

    Returns:
        By op: `available` (backends that can run here, by name), `used` (backend by device type, an explanation where
        there is none), `refused` (why, by name of the backend, for those that cannot run on the CPU here), and
        `instruction_sets` of the compiled extension, slowest first.
    """
    report = {}
    for op, implementations in _registry.items():
        refused = {name: reason for name, backend in implementations.items() if (reason := backend.refusal("cpu"))}
        used = {}
        for device in DEVICES:
            try:
                used[device] = _choose(op, device)
            except BackendError as error:
                used[device] = str(error)
        report[op] = {
            "available": [name for name in implementations if name not in refused],
            "used": used,
            "refused": refused,
            "instruction_sets": native.instruction_sets(),
        }
    return report


def _choose(op: str, device: str) -> str:
    implementations = _registry[op]
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in implementations:
            known = ", ".join(sorted(implementations))
            raise BackendError(f"{VARIABLE}={forced}: {op} has no such backend; it has {known}")
        if reason := implementations[forced].refusal(device):
            raise BackendError(f"{VARIABLE}={forced}: {op} cannot use it: {reason}; unset {VARIABLE} or change it")
        return forced
    for name in PREFERENCE:
        # The interpreter is slow: it runs when it is asked for by name.
        usable = name in implementations and not (name == "triton" and interpreted())
        if usable and implementations[name].refusal(device) is None:
            return name
    return "reference"


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fillm_kernels runs on torch's own operators, slower: {native.refusal}; reinstall with a C++ compiler",
            RuntimeWarning,
            stacklevel=3,
        )
