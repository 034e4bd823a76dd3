"""Commands of fillm as processes of their own, timed from outside."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fillm.errors import FillmError, UsageError


def timed_command(name: str, words: Sequence[str], out: Path, threads: int, processes: int = 1) -> tuple[float, Any]:
    """One run of `fillm.NAME` into `out`, which is replaced: its seconds from start to end, and its `run.yaml`.

    Args:
        name: of the command, such as `rank`.
        words: its flags but `--out`.
        out: the run folder.
        threads: of each process.
        processes: more than one are started by torchrun.

    Raises:
        UsageError: with the command's own line, where it refuses what it was given.
        RuntimeError: with all that it said, where it fails.
    """
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    begun = time.perf_counter()
    _output([*start, f"fillm.{name}", *words, "--out", str(out), "--overwrite"], name, threads)
    taken = time.perf_counter() - begun
    return taken, yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))


def printed_command(name: str, words: Sequence[str], threads: int) -> str:
    """What one run of `fillm.NAME` prints, of a dry run for one; arguments and errors as of `timed_command`."""
    return _output([sys.executable, "-m", f"fillm.{name}", *words], name, threads)


def _output(command: Sequence[str], name: str, threads: int) -> str:
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith(f"fillm {name}: ")]
        raise UsageError(told[-1]) if told else RuntimeError(done.stderr)
    return done.stdout


def free_cores() -> int:
    """Not the cores of the machine: those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_bench(
    bench: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, given: argparse.Namespace
) -> int:
    """The exit code of a benchmark; where it refuses what it was given, it ends in one line.

    Args:
        bench: what measures.
        parser: of its command line, whose `prog` is what it is called.
        given: what was parsed.
    """
    try:
        bench(given)
    except FillmError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    return 0
