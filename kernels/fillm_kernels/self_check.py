"""First use of a backend on a device: one small case beside the reference, before any result is believed.

A kernel that compiles is not yet a kernel that is right on the card, driver and compiler at hand. The check costs one
small launch per op, device and element type of a process; a backend that is off, or does not launch at all, is refused
for the rest of the process and the next one runs.
"""

import importlib
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Relative error of float32 accumulation over the few hundred terms of a small case is under 1e-5; a wrong index or a
# product rounded to a narrower type shows at 1e-3 and above.
TOLERANCE = 1e-4


class SelfChecks:
    """What has been checked in this process, and what failed."""

    def __init__(self) -> None:
        self._done: set[tuple[str, str, torch.device, torch.dtype]] = set()
        self._under_way = set(self._done)  # of the thread that checks
        self._failures: dict[tuple[str, str], str] = {}
        self._checking = threading.RLock()  # a reference may itself call an op whose check is due

    def failure(self, op: str, backend: str) -> str | None:
        """Why a backend failed, with the figures, or None if it passed or was never used."""
        return self._failures.get((op, backend))

    def run_if_due(
        self,
        op: str,
        backend: str,
        run: Callable[..., Any],
        reference: Callable[..., Any],
        module: str,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        """Check a backend at its first use on a device in a dtype; a failure is kept and warned of once.

        Args:
            op: name of the op.
            backend: name of the backend.
            run: the backend; takes what `small_case` returns.
            reference: the op's reference; takes the same.
            module: where `small_case(dtype, device)` is found, one case or a list of them; a module without one is
                not checked.
            device: where the case is placed.
            dtype: its element type; None for bfloat16, the type of the matrix units.
        """
        dtype = dtype or torch.bfloat16
        key = (op, backend, device, dtype)
        # A launch that is being captured into a CUDA graph must not synchronise: the check waits for the next call.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if key in self._done or (op, backend) in self._failures or capturing:
            return
        with self._checking:  # another thread's first call waits for the verdict
            if key in self._done or key in self._under_way or (op, backend) in self._failures:
                return
            self._under_way.add(key)
            reason = _verdict(run, reference, module, device, dtype)
            where = f"self-check on {device} in {str(dtype).removeprefix('torch.')}"
            if reason:
                self._failures[op, backend] = f"{where}: {reason}"
            self._done.add(key)
        if reason:
            text = f"fillm_kernels: {op} does not use its {backend} backend; {where}: {reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=6)


def _verdict(
    run: Callable[..., Any], reference: Callable[..., Any], module: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """What is wrong with a backend on its module's small case, or None."""
    try:
        small_case = getattr(importlib.import_module(module), "small_case", None)
        if small_case is None:
            return None
        errors = []
        for given, wanted in zip(*(_cases(small_case(dtype, device)) for _ in range(2)), strict=True):
            got, want = _results(run(*given), given), _results(reference(*wanted), wanted)
            errors += [_relative_error(a, b) for a, b in zip(got, want, strict=True)]
        errors = torch.tensor(errors)
    except Exception as error:  # whatever the compiler or the driver raises, another backend can still run
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    worst = float(errors.max())  # NaN if one of them is
    return None if worst <= TOLERANCE else f"off from the reference by {worst:.1e} relative ({TOLERANCE:.0e} allowed)"


def _cases(case: Any) -> list[Sequence[Any]]:
    """Arguments of every call: a list of them, where an op has kernels that no single call reaches, or one tuple."""
    return case if isinstance(case, list) else [case]


def _results(returned: Any, arguments: Sequence[Any]) -> list[Tensor]:
    """Tensors to compare: what was returned, or every argument of an op that returns nothing and works in place."""
    value = arguments if returned is None else returned
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts if part is not None for tensor in _results(part, ())]


def _relative_error(got: Tensor, want: Tensor) -> float:
    if not want.is_floating_point():  # masks and counts are right or wrong
        return 0.0 if torch.equal(got.cpu(), want.cpu()) else torch.inf
    want = want.to(device="cpu", dtype=torch.float64)
    scale = float(want.norm())
    off = float((got.to(device="cpu", dtype=torch.float64) - want).norm())
    return off / scale if scale > 0 else off
