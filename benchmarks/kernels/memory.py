"""Peak resident memory of one call in this process (Linux)."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_bytes(call: Callable[[], object]) -> int | None:
    """Most bytes resident during a call beyond those before it, its result included; None where /proc does not say.

    `VmHWM` is set back to what is resident before the call; what the allocator kept of earlier calls is given back
    first, where the C library can.
    """
    if not (_STATUS.exists() and _CLEAR_REFS.exists()):
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text("5")  # resets VmHWM: proc(5)
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def mebibytes(size: int | None) -> str:
    """For a table; empty for None."""
    return "" if size is None else f"{size / 2**20:.1f}"


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
