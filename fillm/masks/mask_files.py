"""Mask files: safetensors with one uint8 tensor for every tensor that has rows or bits, and a record of them all.

The record is JSON in the metadata under `fillm_mask`, `{"format_version", "sha256", "record"}`, the checksum being that
of the record as it stands there. It holds provenance, model fingerprint, and of every tensor name, shape, form and the
sha256 of its bytes. `rows` are one bit a slice of the first dimension, `bits` one bit a weight, the least significant
first; `whole` has no bytes at all. Everything is verified before it is used: the record on opening, a tensor when it
is asked for.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fillm.errors import MaskError, UsageError
from fillm.masks.tensor_mask import TensorMask, pack
from fillm.paths import expanded
from fillm.runs.state_files import writing
from fillm.runs.tensor_files import StreamedTensor, write_streamed

FORMAT_VERSION = 1
_KEY = "fillm_mask"
_FORMS = ("whole", "rows", "bits")
_LARGEST = 1 << 62  # weights of a tensor: sizes stay 64-bit
_PIECE_BYTES = 1 << 22
_REMEDY = "make the mask again, or copy the file again from where it is whole"
_DISK = "free space or name another file; what was there before is as it was"


def why_no_name(name: Any) -> str | None:
    """Why this can be no parameter's name, None if it can."""
    if not isinstance(name, str) or not name:
        return "a name is a string that is not empty"
    if "/" in name or "\\" in name or not name.isprintable():
        return "a parameter's name has no path separator and no control character"
    return None


def save_mask(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorMask],
    provenance: Mapping[str, Any],
    model_fingerprint: str | None,
) -> None:
    """Writes a mask file.

    Raises:
        RunFolderError: if the disk refuses.
    """
    stored = {name: data for name, tensor in tensors.items() if (data := _stored(tensor)) is not None}
    described = [
        {"name": name, "shape": list(tensor.shape), "form": tensor.form, "sha256": _sha256(stored.get(name))}
        for name, tensor in tensors.items()
    ]
    record = {"provenance": dict(provenance), "model_fingerprint": model_fingerprint, "tensors": described}
    whole = {"format_version": FORMAT_VERSION, "sha256": _record_sha256(record), "record": record}
    streamed = {name: StreamedTensor("U8", (len(data),), [data.numpy()]) for name, data in stored.items()}
    target = expanded(path)
    with writing(target, _DISK):
        write_streamed(target, streamed, {_KEY: json.dumps(whole)})


def _stored(tensor: TensorMask) -> Tensor | None:
    """The bytes of a tensor in the file, uint8; None if it needs none."""
    if tensor.form == "whole":
        return None
    return tensor.packed() if tensor.form == "bits" else pack(tensor.row_flags())


def _sha256(data: Tensor | None) -> str:
    digest = hashlib.sha256()
    for piece in () if data is None else data.split(_PIECE_BYTES):
        digest.update(piece.numpy().data)
    return digest.hexdigest()


def _record_sha256(record: Any) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


class MaskTensors(Mapping[str, TensorMask]):
    """The tensors of an open mask file; each is mapped, verified and kept when it is first asked for.

    Raises:
        MaskError: then, if its bytes are not those that were written.
    """

    def __init__(self, path: Path, opened: Any, described: Sequence[Mapping[str, Any]]) -> None:
        self._path, self._opened = path, opened
        self._described = {entry["name"]: entry for entry in described}
        self._found: dict[str, TensorMask] = {}

    def __getitem__(self, name: str) -> TensorMask:
        if name not in self._found:
            self._found[name] = self._read(name, self._described[name])
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def __contains__(self, name: object) -> bool:
        return name in self._described

    def _read(self, name: str, entry: Mapping[str, Any]) -> TensorMask:
        shape, form = tuple(entry["shape"]), entry["form"]
        if form == "whole":
            return TensorMask(shape)
        try:
            data = self._opened.get_tensor(name)
            if _sha256(data) != entry["sha256"]:
                raise _damaged(self._path, f"the checksum of {name} differs")
            flags = TensorMask(shape[:1] if form == "rows" else shape, bits=data)
            mask = TensorMask.from_rows(shape, flags.to_bool()) if form == "rows" else TensorMask(shape, bits=data)
        except UsageError as error:
            raise _damaged(self._path, f"{name}: {error}") from None
        if not mask:
            raise _damaged(self._path, f"{name}: nothing of it is selected")
        return mask


def load_mask(path: str | os.PathLike[str]) -> tuple[MaskTensors, dict[str, Any], str | None]:
    """Opens a mask file: its tensors, their provenance and the model's fingerprint.

    Raises:
        MaskError: naming the file and what is wrong with it.
    """
    target = expanded(path)
    opened = _open(target)
    try:
        text = (opened.metadata() or {}).get(_KEY)
        if text is None:
            raise MaskError(
                f"{target}: is no mask file (no {_KEY} in its metadata); give one that fillm has saved, or turn bool "
                "tensors into one by fillm.Mask.import_bool(FILE).save(NEW)"
            )
        whole = json.loads(text)
        version = whole["format_version"]
        if version != FORMAT_VERSION:
            raise MaskError(f"{target}: of format version {version!r}, this fillm reads {FORMAT_VERSION}; use a newer")
        record = whole["record"]
        if _record_sha256(record) != whole["sha256"]:
            raise ValueError("the checksum of its record differs")
        described, provenance, fingerprint = record["tensors"], record["provenance"], record["model_fingerprint"]
        if not isinstance(provenance, dict) or not isinstance(fingerprint, str | None):
            raise ValueError("provenance or fingerprint of another type")
        for entry in described:
            _check_entry(entry)
        names = [entry["name"] for entry in described]
        if names != sorted(set(names)):
            raise ValueError("its tensors are not in the order of their names")
        if {entry["name"] for entry in described if entry["form"] != "whole"} != set(opened.keys()):
            raise ValueError("its tensors are not those of its record")
        for entry in described:
            if entry["form"] != "whole":
                _check_stored(opened.get_slice(entry["name"]), entry)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise _damaged(target, error) from None
    return MaskTensors(target, opened, described), provenance, fingerprint


def _check_entry(entry: Mapping[str, Any]) -> None:
    name, shape = entry["name"], entry["shape"]
    if (why := why_no_name(name)) is not None:
        raise ValueError(f"a tensor is called {name!r}: {why}")
    if entry["form"] not in _FORMS or not isinstance(entry["sha256"], str):
        raise ValueError(f"{name}: unknown form or no checksum")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{name}: its shape is no list of sizes")
    numel = 1
    for size in shape:
        numel = min(numel * size, _LARGEST)
    if numel == _LARGEST or (entry["form"] == "rows" and not shape):
        raise ValueError(f"{name}: no tensor has the shape {str(shape)[:80]}")


def _check_stored(stored: Any, entry: Mapping[str, Any]) -> None:
    flags = entry["shape"][0] if entry["form"] == "rows" else torch.Size(entry["shape"]).numel()
    dtype, shape = stored.get_dtype(), list(stored.get_shape())
    if dtype != "U8" or shape != [-(-flags // 8)]:
        raise ValueError(f"{entry['name']}: its bytes must be U8 [{-(-flags // 8)}], not {dtype} {shape}")


def write_bools(path: str | os.PathLike[str], tensors: Mapping[str, TensorMask]) -> None:
    """Writes `{name: bool tensor}` as safetensors, in pieces.

    Raises:
        RunFolderError: if the disk refuses.
    """
    streamed = {name: StreamedTensor("BOOL", tensor.shape, tensor.unpacked()) for name, tensor in tensors.items()}
    target = expanded(path)
    with writing(target, _DISK):
        write_streamed(target, streamed, {})


def read_bools(path: str | os.PathLike[str]) -> dict[str, TensorMask]:
    """Reads `{name: bool tensor}`; the bits of all tensors and the bools of one are in memory at a time.

    Raises:
        MaskError: naming the file and what is wrong with it.
    """
    target, masks = expanded(path), {}
    opened = _open(target)
    try:
        for name in sorted(opened.keys()):
            if (why := why_no_name(name)) is not None:
                raise ValueError(f"a tensor is called {name!r}: {why}")
            if (dtype := opened.get_slice(name).get_dtype()) != "BOOL":
                raise MaskError(f"{target}: {name} is of type {dtype}; save a mask as bool tensors, one for a weight")
            masks[name] = TensorMask.from_bool(opened.get_tensor(name))
    except (ValueError, SafetensorError) as error:
        raise _damaged(target, error) from None
    return masks


def _open(path: Path) -> Any:
    if not path.is_file():
        raise MaskError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a mask file")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, what: object) -> MaskError:
    return MaskError(f"{path}: damaged, or no mask ({' '.join(str(what).split())}); {_REMEDY}")
