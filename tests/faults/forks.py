"""Commands in forks of a process that has loaded everything, each ended at a chosen moment.

A process of its own forks (`python -m tests.faults.killed_runs` and the like): one with threads, such as the tests',
must not. A fork needs a fraction of a second where a new process needs many.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import mmap
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from fillm.rank import ranking_files
from fillm.statistics import store_writer

WRITES = ("fsync", "replace", "pwrite", "unlink", "mkdir")
# The record of when a run was made and how long it took, and a lock.
NOT_COMPARED = ("run.yaml", "lock")


@dataclass(frozen=True)
class Moment:
    """When a command is sent a signal, and which.

    Attributes:
        at: the number of the call, from 1.
        of: of the calls that reach the disk (`writes`), or of all calls of Python functions (`calls`).
        number: SIGKILL, SIGTERM or SIGINT.
    """

    at: int
    of: str = "writes"
    number: int = signal.SIGKILL


_SENT = mmap.mmap(-1, 1)  # shared with forks


def was_sent() -> bool:
    """Whether the last fork got its signal before it was over."""
    return _SENT[0] == 1


def prepare() -> None:
    """Small blocks of a store, one thread, and no picture, which takes longer than the pass that it shows."""
    torch.set_num_threads(1)
    store_writer.BLOCK_SAMPLES = 3
    ranking_files.score_heatmap = lambda *given, **options: None


def main_of(command: str) -> Callable[[Sequence[str]], int]:
    """The entry of `fillm <command>`."""
    return importlib.import_module(f"fillm.{command}.__main__").main


def child(
    command: str,
    arguments: Sequence[str],
    *,
    moment: Moment | None = None,
    messages: str | os.PathLike[str] = os.devnull,
    prepared: Callable[[], object] | None = None,
    leaving: Callable[[], object] | None = None,
) -> int:
    """Runs a command in a fork.

    Args:
        command: its name.
        arguments: its command line.
        moment: when it is ended; None lets it be.
        messages: what it says on stderr goes there.
        prepared: called in the fork before the command.
        leaving: called in the fork after it.

    Returns:
        Its exit status, or minus the signal that ended it.
    """
    main, _SENT[0] = main_of(command), 0
    process = os.fork()
    if process == 0:
        with open(messages, "w", encoding="utf-8") as said, open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(said.fileno(), 2)
        if prepared is not None:
            prepared()
        if moment is not None:
            _send(moment)
        status = 1
        try:
            status = main(arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.setprofile(None)
            if leaving is not None:
                leaving()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _watched(met: dict[str, int], reached: Callable[[str], None], of: Sequence[str]) -> None:
    """Counts this process's calls by kind in `met`, and tells `reached` of each."""

    def note(kind: str) -> None:
        met[kind] = met.get(kind, 0) + 1
        reached(kind)

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def inner(*given: Any, **options: Any) -> Any:
            note("writes")
            return None if name == "fsync" else call(*given, **options)  # slow, and no kill depends on it

        return inner

    if "writes" in of:
        for name in WRITES:
            setattr(os, name, counted(getattr(os, name), name))
    if "calls" in of:
        sys.setprofile(lambda frame, event, _: note("calls") if event == "call" else None)


def _send(moment: Moment) -> None:
    """Arranges that this process gets its signal."""
    met: dict[str, int] = {}

    def reached(kind: str) -> None:
        if met[kind] == moment.at:
            sys.setprofile(None)
            _SENT[0] = 1
            os.kill(os.getpid(), moment.number)

    _watched(met, reached, (moment.of,))


def preload(command: str, arguments: Sequence[str], notes: Path) -> None:
    """Runs a command in a fork, then imports here what it has imported there: the forks after it need not.

    Args:
        command: its name.
        arguments: its command line.
        notes: a file that is made for it.
    """
    for name in _told(command, arguments, notes, leaving=lambda: print(*sys.modules, file=sys.stderr)).split():
        if name not in sys.modules and name.replace(".", "").isidentifier():
            with warnings.catch_warnings(), contextlib.suppress(Exception):  # what a library made on the way
                warnings.simplefilter("ignore")
                importlib.import_module(name)


def calls_of(command: str, arguments: Sequence[str], notes: Path, of: Sequence[str]) -> dict[str, int]:
    """How many calls of each kind, `writes` and `calls`, a whole run has; arguments as of `preload`."""
    met: dict[str, int] = {}
    watch, tell = lambda: _watched(met, lambda kind: None, of), lambda: print(json.dumps(met), file=sys.stderr)
    return json.loads(_told(command, arguments, notes, prepared=watch, leaving=tell))


def _told(command: str, arguments: Sequence[str], notes: Path, **hooks: Callable[[], object]) -> str:
    """The last line of a fork that has to succeed."""
    status = child(command, arguments, messages=notes, **hooks)
    lines = notes.read_text(encoding="utf-8").splitlines()
    if status != 0:
        raise RuntimeError(f"fillm {command}: exit status {status}: {lines[-20:]}")
    return lines[-1]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that a run leaves, but for `NOT_COMPARED`; of a log without its seconds."""
    return {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED
    }


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.name == "log.parquet":
        log = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read(use_threads=False)
        data = repr([log.drop_columns("seconds").to_pydict()]).encode()  # NaN in it equals nothing but its name
    return hashlib.sha256(data).hexdigest()


def limit_files(size: int) -> None:
    """From now on no file of this process may outgrow `size` bytes: what goes beyond is refused (EFBIG)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
