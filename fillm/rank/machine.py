"""What a plan has to know of the machine: its speed, and what this process holds already."""

import os
import time

import torch


def measured_rate(device: torch.device, seconds: float = 0.2) -> float:
    """FLOP/s of float32 products of 1024 x 1024 matrices on `device`, repeated for `seconds` after one to warm up."""
    a = torch.ones(1024, 1024, device=device)
    done, _ = 0, a @ a
    _wait(device)
    begun = time.perf_counter()
    while not done or time.perf_counter() - begun < seconds:
        a @ a
        _wait(device)
        done += 1
    return done * 2.0 * 1024**3 / (time.perf_counter() - begun)


def measured_bandwidth(device: torch.device, seconds: float = 0.1) -> float:
    """Bytes/s that a copy of 64 MiB reads and writes in the memory of `device`, repeated for `seconds` after one."""
    a = torch.ones(1 << 24, device=device)
    b, done = a.clone(), 0
    _wait(device)
    begun = time.perf_counter()
    while not done or time.perf_counter() - begun < seconds:
        b.copy_(a)
        _wait(device)
        done += 1
    return done * 2.0 * a.nbytes / (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def program_bytes() -> int:
    """What this process holds once it has computed a gradient: the interpreter, its libraries and their threads."""
    a = torch.ones(256, 256, requires_grad=True)
    (a @ a).sum().backward()
    return _resident_bytes()


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_memory() -> int:
    """Bytes that a process may still take without swapping, as the kernel estimates it; 8 GiB where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 33
