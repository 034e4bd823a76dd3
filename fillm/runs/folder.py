"""A run's folder: it appears whole or not at all, and an interrupted run continues where it stopped.

While a run goes on, everything lies in the sibling `<out>.partial`: a lock, what the run was made from, the state of
the pass in hand, the results of finished stages, and at the end the final files in `<out>.partial/final`, which are
renamed to `<out>` in one step.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from fillm.errors import RunFolderError, UsageError
from fillm.paths import out_path
from fillm.runs.record import RUN_RECORD
from fillm.runs.state_files import (
    ANEW,
    NOTHING_SAVED,
    SAVED,
    drop_pair,
    load_pair,
    read_json,
    save_pair,
    sync,
    write_json,
    writing,
)
from fillm.runs.tensor_files import save_streamed

_LOCK, _IDENTITY, _INTENT, _STATE = "lock", "identity.json", "intent.json", "state"
_FINAL, _DONE, _REPLACED = "final", "done", "replaced"

Written = TypeVar("Written")


class RunFolder:
    """The folder of one run, held exclusively from construction until `finish` or `close`.

    Args:
        out: the folder to make; its parents are made.
        overwrite: replace a finished `out` (only once the new one is whole) and discard an unfinished run.
        resume: continue an unfinished run; with none, start anew.
        notice: told, in one line, that there was nothing to resume.

    Attributes:
        resumed: whether there is something to continue from.

    Raises:
        RunFolderError: if `out` exists and `overwrite` is not given, if it is not a run folder, if an unfinished run is
            there and neither option is given, if another run holds it, or if the disk refuses.
        UsageError: if both options are given.
    """

    def __init__(
        self, out: str | os.PathLike[str], *, overwrite: bool, resume: bool, notice: Callable[[str], None] | None = None
    ) -> None:
        if overwrite and resume:
            raise UsageError("--resume continues a run and --overwrite replaces it: give one")
        self.out = out_path(out)
        if not self.out.name:
            raise RunFolderError(f"--out {out}: is the root of the file system; name a folder in it")
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._lock: int | None = None
        self.resumed = False
        with writing(self.out, "give another --out"):
            for parent in self.out.parents:  # of which some may not be looked into
                if parent.exists() and not parent.is_dir():
                    raise RunFolderError(f"--out {out}: {parent} is a file; name a folder in a folder")
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            if _occupied(self.out) and not overwrite and not (resume and self._replaces()):
                finished = "is finished: there is nothing to resume" if resume else "exists"
                raise RunFolderError(f"{self.out} {finished}; give --overwrite or another --out")
            self.partial.mkdir(exist_ok=True)
            self._acquire()
            try:
                self._enter(overwrite, resume, notice)
            except BaseException:
                self.close()
                raise

    def _refuse_foreign(self) -> None:
        """Never delete or fill a folder that no run has made."""
        if _occupied(self.out) and not (self.out / RUN_RECORD).is_file():
            raise RunFolderError(f"{self.out} exists and is not a run folder (no {RUN_RECORD}); give another --out")
        if _occupied(self.partial) and not (self.partial / _LOCK).is_file():
            raise RunFolderError(f"{self.partial} exists and is not an unfinished run; move it, or give another --out")

    def _replaces(self) -> bool:
        """Whether the unfinished run was started with --overwrite over the `out` that is there."""
        return not self._is_leftover() and bool((read_json(self.partial / _INTENT) or {}).get("replaces"))

    def _is_leftover(self) -> bool:
        """Whether the run was finished and only its clearing away was interrupted."""
        return (self.partial / _DONE).exists() and not (self.partial / _FINAL).exists()

    def _acquire(self) -> None:
        path = self.partial / _LOCK
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have finished meanwhile and taken the folder away with it.
            same = path.exists() and os.fstat(self._lock).st_ino == path.stat().st_ino
        except OSError:
            same = False
        if not same:
            os.close(self._lock)
            self._lock = None
            raise RunFolderError(f"{self.out}: another run is at work in it; wait for it, or give another --out")

    def _enter(self, overwrite: bool, resume: bool, notice: Callable[[str], None] | None) -> None:
        if (self.partial / _REPLACED).exists() and not _occupied(self.out):
            os.replace(self.partial / _REPLACED, self.out)  # stopped between the two renames of a replacement
        if self._is_leftover():
            self._clear()
        if self._holds_work() and not (overwrite or resume):
            raise RunFolderError(
                f"{self.partial} is an unfinished run; give --resume to continue it or --overwrite to discard it"
            )
        self.resumed = resume and self._holds_work()
        if not self.resumed:
            if resume and notice is not None:
                notice(f"{self.out}: nothing to resume; starting anew")
            self._clear()
            write_json(self.partial / _INTENT, {"replaces": _occupied(self.out)})
        (self.partial / _DONE).unlink(missing_ok=True)  # first: without `final` it would say that the run is over
        shutil.rmtree(self.partial / _FINAL, ignore_errors=True)
        shutil.rmtree(self.partial / _REPLACED, ignore_errors=True)

    def _holds_work(self) -> bool:
        return any(self.partial.glob(f"{_STATE}.json")) or any(self.partial.glob("stage-*.json"))

    def _remedy(self) -> str:
        return SAVED if self._holds_work() else NOTHING_SAVED

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def check_identity(self, identity: Mapping[str, str]) -> None:
        """Records what the run is made from; on a resumed run, refuses anything else.

        Args:
            identity: what must not change: fingerprints of model and data, settings that matter.

        Raises:
            RunFolderError: naming every entry that differs.
        """
        found = read_json(self.partial / _IDENTITY)
        if found is None:
            if self.resumed:
                raise RunFolderError(f"{self.partial / _IDENTITY}: missing; start anew with --overwrite")
            with writing(self.partial, self._remedy()):
                write_json(self.partial / _IDENTITY, dict(identity))
            return
        if not all(isinstance(value, str) for value in found.values()):
            raise RunFolderError(f"{self.partial / _IDENTITY}: damaged (an entry is no text); {ANEW}")
        names = [name for name in sorted({*found, *identity}) if found.get(name) != identity.get(name)]
        if names:
            shown = "; ".join(f"{name} {_change(found.get(name), identity.get(name))}" for name in names)
            raise RunFolderError(
                f"{self.partial}: made from something else ({shown}); give what it was made from, or --overwrite"
            )

    def save_state(self, stage: str, cursor: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Saves where a pass stands; the state before stays until this one is whole.

        Args:
            stage: name of the pass.
            cursor: number of batches done.
            tensors: what the pass has accumulated.
            meta: anything JSON holds.

        Raises:
            RunFolderError: if the disk refuses; the state before is then still there.
        """
        record = {"stage": stage, "cursor": cursor, "meta": dict(meta)}
        save_pair(self.partial, _STATE, tensors, record, self._remedy())

    def load_state(self) -> tuple[str, int, dict[str, Tensor], dict[str, Any]] | None:
        """The last saved `(stage, cursor, tensors, meta)`, tensors on the CPU; None if there is none.

        Raises:
            RunFolderError: if it is damaged.
        """
        return read_state(self.partial)

    def save_stage(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keeps the result of a finished stage; the state of the pass that led to it is dropped.

        Raises:
            RunFolderError: if the disk refuses; everything saved before is then still there.
        """
        save_pair(self.partial, f"stage-{name}", tensors, {"meta": dict(meta)}, self._remedy())
        drop_pair(self.partial, _STATE)

    def load_stage(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The result of a finished stage, tensors on the CPU; None if it is not finished.

        Raises:
            RunFolderError: if it is damaged.
        """
        return read_stage(self.partial, name)

    def set_aside(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moves tensors to the disk until the run is over.

        Returns:
            The tensors as a map of the file, which need not be in memory.

        Raises:
            RunFolderError: if the disk refuses; everything saved before is then still there.
        """
        path = self.partial / f"{name}.safetensors"
        with writing(self.partial, self._remedy()):
            save_streamed(path, tensors)
            return load_file(path)

    def finish(self, writer: Callable[[Path], Written]) -> Written:
        """Has the final files written, lets the folder appear under its name, and clears the states away.

        Args:
            writer: writes the files into the empty folder it is given, `run.yaml` among them.

        Returns:
            What `writer` returned.

        Raises:
            RunFolderError: if the disk refuses, or if `out` has appeared meanwhile; the run then stays resumable.
        """
        final = self.partial / _FINAL
        with writing(self.out, self._remedy()):
            shutil.rmtree(final, ignore_errors=True)
            final.mkdir()
            written = writer(final)
            for path in [*final.rglob("*"), final]:
                if path.is_file():  # safetensors come readable by their owner alone
                    shutil.copymode(final / RUN_RECORD, path)
                sync(path)
            replaces = bool((read_json(self.partial / _INTENT) or {}).get("replaces"))
            if _occupied(self.out) and not replaces:
                raise RunFolderError(f"{self.out} has appeared meanwhile; move it, then give --resume")
            (self.partial / _DONE).touch()
            self._put_in_place(final)
            self._clear()
        self.close()
        return written

    def _put_in_place(self, final: Path) -> None:
        old = self.partial / _REPLACED if _occupied(self.out) else None
        if old is not None:
            os.replace(self.out, old)
        try:
            os.replace(final, self.out)
        except OSError:
            if old is not None:
                os.replace(old, self.out)
            raise
        sync(self.out.parent)

    def close(self) -> None:
        """Lets go of the lock; an unfinished run that has saved nothing leaves nothing behind."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if not self._holds_work() and not (self.partial / _REPLACED).exists():
                shutil.rmtree(self.partial)
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_state(partial: Path) -> tuple[str, int, dict[str, Tensor], dict[str, Any]] | None:
    """`RunFolder.load_state` of a folder that another process holds."""
    found = load_pair(partial, _STATE)
    if found is None:
        return None
    tensors, record = found
    try:
        return record["stage"], record["cursor"], tensors, record["meta"]
    except KeyError as error:
        raise RunFolderError(f"{partial / _STATE}.json: damaged (says nothing of {error}); {ANEW}") from None


def read_stage(partial: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """`RunFolder.load_stage` of a folder that another process holds."""
    found = load_pair(partial, f"stage-{name}")
    if found is not None and "meta" not in found[1]:
        raise RunFolderError(f"{partial / f'stage-{name}'}.json: damaged (says nothing of 'meta'); {ANEW}")
    return None if found is None else (found[0], found[1]["meta"])


def _occupied(path: Path) -> bool:
    """Whether something is at `path` that must not be lost; an empty folder is as good as none."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _change(old: str | None, new: str | None) -> str:
    """`was A, is B`, of long values only the neighbourhood of where they part."""
    if old is None or new is None:
        return "was not there" if old is None else "is not there"
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    begin = max(0, same - 24) if max(len(old), len(new)) > 48 else 0
    return f"was {_cut(old, begin)}, is {_cut(new, begin)}"


def _cut(text: str, begin: int, length: int = 48) -> str:
    piece = text[begin : begin + length]
    return ("..." if begin else "") + piece + ("..." if begin + length < len(text) else "")
