"""The files of a store that hold rows: sketches of every tensor, and the squared norms of all."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fillm.errors import StoreError
from fillm.statistics.store_format import DTYPES, REMEDY, Manifest

SKETCHES, SQUARED_NORMS = "sketches", "squared_norms.bin"


def sketch_path(folder: Path, index: int) -> Path:
    """Where the rows of the tensor at `index` of the manifest lie."""
    return folder / SKETCHES / f"{index}.bin"


def row_files(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, int, str]]:
    """(path, bytes a row, what of) of every file of rows; the squared norms come last."""
    size = DTYPES[manifest.settings.dtype].itemsize
    for index, tensor in enumerate(manifest.tensors):
        yield sketch_path(folder, index), tensor.dim * size, f"the sketches of {tensor.name}"
    yield folder / SQUARED_NORMS, len(manifest.tensors) * torch.float64.itemsize, "the squared norms"


def check_size(path: Path, size: int, what: str) -> None:
    """Refuses a file of rows that is shorter than the manifest says; a longer one is being written, or was cut short.

    Raises:
        StoreError: naming the file and what it holds.
    """
    if size == 0:
        return  # files are made with the first block
    try:
        found = path.stat().st_size
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror
        raise StoreError(f"{path}: {reason} ({what}); {REMEDY}") from None
    if found < size:
        raise StoreError(f"{path}: damaged ({what}: {found} bytes, not {size}); {REMEDY}")


def mapped(path: Path, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of a file, memory-mapped: what is written to the tensor does not reach the file."""
    if rows * columns == 0:
        return torch.empty(rows, columns, dtype=dtype)
    flat = torch.from_file(os.fspath(path), shared=False, size=rows * columns, dtype=dtype)
    return flat.view(rows, columns)


def tensor_bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return values.reshape(-1).view(torch.uint8).numpy().data


def sha256_of(values: Tensor) -> str:
    """sha256 of a contiguous CPU tensor's bytes: 64 hexadecimal digits."""
    return hashlib.sha256(tensor_bytes(values)).hexdigest()


def write_rows(path: Path, values: Tensor, offset: int) -> None:
    """Writes a CPU tensor's bytes at a place in a file, which is made if there is none.

    Raises:
        OSError: if the disk refuses.
    """
    data = tensor_bytes(values)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        while data:
            written = os.pwrite(handle, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(handle)
