"""Peak resident memory of one variant, measured in a process of its own (Linux).

The peak is `VmHWM` of /proc, reset after loading: `ru_maxrss` would count the process that started this one too.
"""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.end_to_end.settings import BenchConfig
from benchmarks.end_to_end.variants import variants
from benchmarks.end_to_end.workload import load_workload, spread

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Resident bytes: with everything loaded before the run, and at most during it."""

    loaded: int
    peak: int


def available() -> bool:
    """Whether this system says what a process's peak is."""
    return _STATUS.exists() and _CLEAR_REFS.exists()


def measure(config: BenchConfig, key: str, num_retain: int | None = None) -> Memory:
    """Runs variant `key` once in a fresh process.

    Args:
        config: resolved settings.
        key: of the variant.
        num_retain: use this many retain samples, the longest among them; None for all.

    Raises:
        RuntimeError: the process failed; with what it said.
    """
    job = json.dumps({"config": dataclasses.asdict(config), "key": key, "num_retain": num_retain})
    path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.end_to_end.peak_memory", job],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"peak memory of {key}: the process ended with {done.returncode}: {done.stderr.strip()}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(config: BenchConfig, key: str, num_retain: int | None) -> Memory:
    """The same in this process, whose earlier peak is forgotten."""
    if config.threads:
        torch.set_num_threads(config.threads)
    work = load_workload(config)
    if num_retain is not None:
        work = dataclasses.replace(work, retain=spread(work.retain, num_retain))
    variant = next(v for v in variants(work, config) if v.key == key)
    gc.collect()
    _CLEAR_REFS.write_text("5")  # resets VmHWM to what is resident now: proc(5)
    loaded = _status("VmRSS")
    variant.run()
    return Memory(loaded, _status("VmHWM"))


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    memory = measure_here(BenchConfig(**given["config"]), given["key"], given["num_retain"])
    print(json.dumps(dataclasses.asdict(memory)))
