"""Seconds of a call, ceilings and name of the machine, and the time that `python -m benchmarks.gpu` may take."""

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from benchmarks.end_to_end.results import commit, processor

ROUNDS, LEAST_ROUNDS = 15, 3
LONG = 1.0  # seconds after which no more than the least number of rounds are made


class Clock:
    """Time since the start, and how much of the whole a stage may use."""

    def __init__(self, minutes: float) -> None:
        self._begun, self._minutes = time.perf_counter(), minutes

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of the whole is gone."""
        return 60 * self._minutes * share - (time.perf_counter() - self._begun)


def seconds(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of a call in each round, by device events on a GPU, after two rounds of warm-up."""
    found: list[float] = []
    begun = time.perf_counter()
    for turn in range(ROUNDS + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            taken = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
        if turn > 1:
            found.append(taken)
        if len(found) >= LEAST_ROUNDS and time.perf_counter() - begun > LONG:
            break
    return found


def ceilings(device: torch.device, shrink: int) -> dict[str, float]:
    """Bytes a second of a large copy (read plus written), FLOP/s of large products in either type."""
    source = torch.randn((1 << 28) // shrink**2, device=device)
    target = torch.empty_like(source)
    copying = seconds(partial(target.copy_, source), device)
    found = {"bandwidth": 8.0 * source.numel() / median(copying)}
    del source, target
    size = 8192 // shrink
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(size, size, device=device).to(dtype)
        found[f"matrix {dtype}"] = 2.0 * size**3 / median(seconds(lambda a=a: a @ a, device))
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The device, its driver and power limit, the versions of what runs on it, the commit and the date."""
    found: dict[str, Any] = {"device": processor()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            **_asked(device, "driver_version", "power.limit", "clocks.max.sm"),
        }
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        **found,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def under_load(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature, to be asked right after the ceilings; nothing without a GPU."""
    return _asked(device, "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu") if device.type == "cuda" else {}


def _asked(device: torch.device, *fields: str) -> dict[str, str]:
    """What nvidia-smi says of a device; empty strings where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    values = [""] * len(fields)
    try:
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = [value.strip() for value in said.stdout.strip().split(",")]
    except (OSError, AttributeError, subprocess.SubprocessError):
        pass  # the columns stay empty
    return dict(zip(fields, values, strict=False))
