"""Safetensors written and read piece by piece, so that a tensor need not fit into memory.

The file is what the library reads: eight bytes with the length of a JSON header, the header, the tensors' bytes one
after another. Unlike the library's writer this one copies nothing, and gives the same bytes for the same metadata.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fillm.runs.state_files import sync

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 1 << 20  # entries


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to be written.

    Attributes:
        dtype: its name in the format: `U8` or `BOOL`, an entry of which is a byte, or a floating one.
        shape: its shape.
        pieces: its bytes in order, in pieces of any size.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[Any]


def write_streamed(path: Path, tensors: Mapping[str, StreamedTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, which appears whole or not at all.

    Args:
        path: the file; replaced as a whole.
        tensors: by name, written in the order of the mapping.
        metadata: any strings.

    Raises:
        OSError: if the disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        size = _DTYPES[tensor.dtype].itemsize if tensor.dtype in _DTYPES else 1
        begin, end = end, end + size * torch.Size(tensor.shape).numel()
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                for piece in tensor.pieces:
                    file.write(piece)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, what it took is needed
        raise
    sync(path.parent)


def save_streamed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes floating tensors, wherever they lie, a piece at a time: the bytes that the library's writer would give.

    Raises:
        OSError: if the disk refuses.
    """
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    order = sorted(described, key=lambda name: (-described[name][0].itemsize, name))  # each begins at its alignment
    streamed = {}
    for name in order:
        dtype, shape = described[name]
        streamed[name] = StreamedTensor(_NAMES[dtype], shape, _pieces(tensors, name))
    write_streamed(path, streamed, {})


def _pieces(tensors: Mapping[str, Tensor], name: str) -> Iterator[Any]:
    """Of a tensor that is looked up when its turn comes: a mapping may read it then."""
    for piece in tensors[name].detach().reshape(-1).split(_PIECE):
        yield piece.cpu().contiguous().view(torch.uint8).numpy()


def read_streamed(path: Path, name: str, entries: int) -> Iterator[Tensor]:
    """The entries of one floating tensor of a file that has been checked, in their flat order, `entries` at a time.

    What was read is let go with its piece, unlike the pages of a memory map, which stay in the process.

    Raises:
        KeyError: for a tensor that is not in it.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        described = json.loads(file.read(length))[name]
        dtype = _DTYPES[described["dtype"]]
        begin, end = (8 + length + offset for offset in described["data_offsets"])
        file.seek(begin)
        for at in range(begin, end, entries * dtype.itemsize):
            yield torch.frombuffer(bytearray(file.read(min(entries * dtype.itemsize, end - at))), dtype=dtype)
