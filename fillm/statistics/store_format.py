"""The sketch store on disk: its files, the records in them, and what refuses a damaged one (docs/store.md)."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from fillm.errors import RunFolderError, StoreError
from fillm.runs.state_files import check_file, read_json, writing

FORMAT_VERSION = 1
_LARGEST = 1 << 63
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANIFEST, LOCK, BLOCKS = "manifest.json", "lock", "blocks"
REMEDY = "build it anew in another --store"
_STORED = "what was stored before is good: see to that, then run it again with this --store"


class MapOfTensor(Protocol):
    """What the store has to know of the map that sketches one tensor's gradients.

    Attributes:
        kind: of the map.
        dim: numbers that a gradient becomes.
        shape: of the tensor.
        seed: this tensor's own.
        halves: how many independent sketches the `dim` numbers are.
    """

    kind: str
    dim: int
    shape: tuple[int, ...]
    seed: int
    halves: int


@dataclass(frozen=True)
class StoreSettings:
    """What all sketches of a store share.

    Attributes:
        kind: the run's kind of compression.
        sketch_dim: the run's size of a sketch.
        seed: the run's.
        dtype: of the stored sketches, `float32` or `bfloat16`.
        loss_reduction: `mean` or `sum` over a sample's tokens.
    """

    kind: str
    sketch_dim: int
    seed: int
    dtype: str
    loss_reduction: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a store, and the map that its rows were made with."""

    name: str
    shape: tuple[int, ...]
    kind: str
    dim: int
    seed: int
    halves: int

    @classmethod
    def of(cls, name: str, to: MapOfTensor) -> "StoredTensor":
        """The record of a map."""
        return cls(name, tuple(to.shape), to.kind, to.dim, to.seed, to.halves)


@dataclass(frozen=True)
class BlockEntry:
    """A block as the manifest knows it: how many rows, and the sha256 of its file."""

    rows: int
    sha256: str


@dataclass(frozen=True)
class Segment:
    """One build or append.

    Attributes:
        samples: how many it is to hold.
        fingerprint: of all of them together, in the order of their data set.
        batches: how many are stored.
        complete: whether that is all of them.
    """

    samples: int
    fingerprint: str
    batches: int
    complete: bool


@dataclass(frozen=True)
class Manifest:
    """What a store holds; what it does not name is not part of the store."""

    model: str
    settings: StoreSettings
    tensors: tuple[StoredTensor, ...]
    blocks: tuple[BlockEntry, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def rows(self) -> int:
        """Samples whose sketches are stored."""
        return sum(block.rows for block in self.blocks)

    @property
    def samples(self) -> int:
        """Samples that it will hold once the segment in hand is complete."""
        return sum(segment.samples for segment in self.segments)

    @property
    def complete(self) -> bool:
        """Whether no build or append is unfinished."""
        return bool(self.segments) and all(segment.complete for segment in self.segments)

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"format_version": FORMAT_VERSION, "rows": self.rows, **asdict(self)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: if there is none, if it is damaged, or if a newer version wrote it.
    """
    path = folder / MANIFEST
    with refused():
        record = read_json(path, REMEDY)
    if record is None:
        raise StoreError(f"{folder}: is not a sketch store (no {MANIFEST}); give another --store")
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(f"{path}: of format version {version}, this fillm reads {FORMAT_VERSION}; use a newer fillm")
    try:
        found = Manifest(
            model=record["model"],
            settings=StoreSettings(**record["settings"]),
            tensors=tuple(StoredTensor(**{**entry, "shape": tuple(entry["shape"])}) for entry in record["tensors"]),
            blocks=tuple(BlockEntry(**entry) for entry in record["blocks"]),
            segments=tuple(Segment(**entry) for entry in record["segments"]),
        )
        for part in (found, found.settings, *found.tensors, *found.blocks, *found.segments):
            _check_types(part)
        if found.settings.dtype not in DTYPES:
            raise TypeError(f"dtype is {found.settings.dtype}")
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: damaged ({error}); {REMEDY}") from None
    return found


def _check_types(part: Any) -> None:
    """Fields that are text, truth values or sizes are that; what they are made of is checked by itself."""
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name == "shape":
            good = all(type(size) is int and 0 <= size < _LARGEST for size in value)
        elif field.type is int:
            good = type(value) is int and (field.name == "seed" or 0 <= value < _LARGEST)
        elif field.type in (str, bool):
            good = isinstance(value, field.type)
        else:
            continue
        if not good:
            raise TypeError(f"{field.name} is {str(value)[:40]}")


def read_block(folder: Path, number: int, entry: BlockEntry) -> dict[str, Any]:
    """The record of one block: a list over its rows of `ids`, `positions`, `fingerprints`, `tokens`, `losses`, ...

    Raises:
        StoreError: if the file is missing or not what was written.
    """
    path = block_path(folder, number)
    with refused():
        check_file(path, entry.sha256, None, REMEDY)
        record = read_json(path, REMEDY)
    if record is None:
        raise StoreError(f"{path}: missing; {REMEDY}")
    return record


def block_path(folder: Path, number: int) -> Path:
    """Where a block's record lies."""
    return folder / BLOCKS / f"{number}.json"


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """`a was 1, is 2; b ...` for what differs; empty where nothing does."""
    return "; ".join(f"{key} was {found[key]}, is {asked[key]}" for key in found if found[key] != asked[key])


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What the files of runs are refused for, a store is refused for."""
    try:
        yield
    except RunFolderError as error:
        raise StoreError(str(error)) from None


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """A disk that refuses (full, no permission), as one line.

    Raises:
        StoreError: in the place of any `OSError`.
    """
    with refused(), writing(path, _STORED):
        yield
