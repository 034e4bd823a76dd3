"""Tensors on disk that are either whole or known to be damaged.

A pair: `<stem>.<first digits of its sha256>.safetensors`, and `<stem>.json`, which names it and holds its checksum and
what belongs to it. The JSON is renamed into place last, and the payload of the pair before is deleted only after that:
at every moment one whole pair lies on disk, or none was ever written.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fillm.documents import LARGEST, read_json_document
from fillm.errors import RunFolderError

_PIECE_BYTES = 1 << 22


SAVED = "what was saved before is good: see to that, then give --resume"
ANEW = "start anew with --overwrite"
NOTHING_SAVED = "nothing was saved: see to that, then start it again"


@contextlib.contextmanager
def writing(path: Path, remedy: str = SAVED) -> Iterator[None]:
    """What goes wrong with a disk (full, no permission), as one line that ends with `remedy`.

    Raises:
        RunFolderError: in the place of any `OSError` or safetensors error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{path}: cannot write: {_reason(error)}; {remedy}") from None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record with its own checksum, atomically.

    Args:
        path: the file; replaced as a whole.
        record: anything JSON holds.
    """
    body = json.dumps(record, sort_keys=True)
    text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "record": json.loads(body)}, indent=1)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def read_json(path: Path, remedy: str = ANEW) -> dict[str, Any] | None:
    """The record of a file that `write_json` wrote, or None if there is no such file.

    Raises:
        RunFolderError: if it is not readable, not JSON, or not what was written; ends with `remedy`.
    """
    try:
        found = read_json_document(path)
        record = found["record"]
        if not isinstance(record, dict):
            raise ValueError("its record is no object")
        if hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest() != found["sha256"]:
            raise ValueError("its checksum differs")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path}: damaged ({_reason(error)}); {remedy}") from None
    return record


def save_pair(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any], remedy: str = SAVED
) -> None:
    """Replaces the pair `stem` in `folder`.

    Args:
        folder: where the files go.
        stem: what the pair is called.
        tensors: any dtypes and devices; views and shared storages are written out in full.
        record: what goes into the JSON beside it.
        remedy: what to do where the disk refuses.

    Raises:
        RunFolderError: if the disk refuses; the pair before is then untouched.
    """
    temporary = folder / f"{stem}.safetensors.tmp"
    with writing(folder / stem, remedy):
        try:
            save_tensors(temporary, tensors)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk, what it took is needed
            raise
        digest = file_sha256(temporary)
        payload = folder / f"{stem}.{digest[:16]}.safetensors"
        size = temporary.stat().st_size
        os.replace(temporary, payload)
        sync(folder)
        write_json(folder / f"{stem}.json", {**record, "file": payload.name, "sha256": digest, "bytes": size})
        for old in folder.glob(f"{stem}.*.safetensors"):
            if old.name != payload.name:
                old.unlink()


def load_pair(folder: Path, stem: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors (on the CPU) and the record of the pair `stem`, or None if there is none.

    Raises:
        RunFolderError: if anything about it is damaged.
    """
    record = read_json(folder / f"{stem}.json")
    if record is None:
        return None
    path = folder / f"{stem}.json"
    try:
        name, size, digest = str(record.pop("file")), record.pop("bytes"), record.pop("sha256")
    except KeyError as error:
        raise RunFolderError(f"{path}: damaged (says nothing of {error}); {ANEW}") from None
    if Path(name).name != name or not name.isprintable():
        raise RunFolderError(f"{path}: damaged (names a file of another folder); {ANEW}")
    check_file(folder / name, digest, size, ANEW)
    try:
        return load_file(folder / name), record
    except (SafetensorError, OSError, ValueError) as error:
        raise RunFolderError(f"{folder / name}: damaged ({_reason(error)}); {ANEW}") from None


def drop_pair(folder: Path, stem: str) -> None:
    """Deletes the pair `stem`, its JSON first."""
    with writing(folder / stem):
        (folder / f"{stem}.json").unlink(missing_ok=True)
        for payload in folder.glob(f"{stem}.*.safetensors"):
            payload.unlink()


def check_file(path: Path, sha256: str, size: int | None, remedy: str) -> None:
    """Refuses a file that is not the one that was written, of unknown size one that is larger than a document.

    Raises:
        RunFolderError: if it is missing, not readable, or differs in size or checksum; ends with `remedy`.
    """
    try:
        found = path.stat().st_size
        if size is None and found > LARGEST:
            raise RunFolderError(f"{path}: damaged (larger than {LARGEST >> 20} MiB); {remedy}")
        if size is not None and found != size:
            raise RunFolderError(f"{path}: damaged ({found} bytes, not {size}); {remedy}")
        if file_sha256(path) != sha256:
            raise RunFolderError(f"{path}: damaged (its checksum differs); {remedy}")
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else _reason(error)
        raise RunFolderError(f"{path}: {reason}; {remedy}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes safetensors and flushes them to the disk; the same bytes for the same tensors.

    Raises:
        OSError, SafetensorError: if the disk refuses.
    """
    whole: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory, and would write a view's whole storage for nothing.
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        whole[name] = tensor
    save_file(whole, path)  # no metadata: its order would differ from run to run
    sync(path)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
