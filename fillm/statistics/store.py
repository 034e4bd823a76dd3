"""Sketches of a data set's gradients, read from disk: memory-mapped, and verified before they are used."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fillm.data import Sample, SampleSet
from fillm.errors import StoreError
from fillm.paths import expanded
from fillm.statistics.store_format import (
    DTYPES,
    MANIFEST,
    REMEDY,
    Manifest,
    MapOfTensor,
    StoredTensor,
    StoreSettings,
    differences,
    read_block,
    read_manifest,
)
from fillm.statistics.store_rows import SQUARED_NORMS, check_size, mapped, row_files, sha256_of, sketch_path


def holds_store(path: str | os.PathLike[str]) -> bool:
    """Whether a sketch store has been begun in a folder.

    Raises:
        StoreError: if the path cannot be looked at.
    """
    try:
        return (expanded(path) / MANIFEST).is_file()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; give another --store") from None


def sample_fingerprint(sample: Sample) -> str:
    """sha256 (hex) over one sample's token ids and labels."""
    return SampleSet([sample], "").fingerprint


class SketchStore:
    """What a store held when it was opened; it may be written on meanwhile.

    Rows are in the order in which samples were visited; `positions` says which is whose.

    Attributes:
        path: the folder.
        manifest: settings, tensors, blocks and segments.
        ids: name of each row's sample.
        positions: [n] int64, position of each row's sample in its data set.
        fingerprints: sha256 of each row's token ids and labels.
        tokens: [n] int64, tokens of each row's sample.
        losses: [n] float64, its loss.
    """

    def __init__(self, path: Path, manifest: Manifest, blocks: list[dict[str, Any]]) -> None:
        self.path, self.manifest, self._blocks = path, manifest, blocks
        self.ids: list[str] = self._column("ids")
        self.fingerprints: list[str] = self._column("fingerprints")
        self.positions = torch.tensor(self._column("positions"), dtype=torch.int64)
        self.tokens = torch.tensor(self._column("tokens"), dtype=torch.int64)
        self.losses = torch.tensor(self._column("losses"), dtype=torch.float64)
        self._index = {tensor.name: index for index, tensor in enumerate(manifest.tensors)}
        self._verified: dict[str, Tensor] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "SketchStore":
        """Reads the manifest and the blocks' records; sketches stay on the disk until they are asked for.

        Raises:
            StoreError: if there is no store, a newer version wrote it, or a file is missing, cut short or damaged.
        """
        folder = expanded(path)
        manifest = read_manifest(folder)
        blocks = [read_block(folder, number, entry) for number, entry in enumerate(manifest.blocks)]
        for file, size, what in row_files(folder, manifest):
            check_size(file, manifest.rows * size, what)
        return cls(folder, manifest, blocks)

    def _column(self, field: str) -> list[Any]:
        return [value for block in self._blocks for value in block[field]]

    @property
    def rows(self) -> int:
        """`n`, samples stored."""
        return self.manifest.rows

    @property
    def complete(self) -> bool:
        """Whether no build or append is unfinished."""
        return self.manifest.complete

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """By name, each tensor's shape and the map of its sketches."""
        return {tensor.name: tensor for tensor in self.manifest.tensors}

    @property
    def fallback(self) -> dict[str, str]:
        """Tensors that the pass had no rule for when the last block was closed, and why."""
        return dict(self._blocks[-1]["fallback"]) if self._blocks else {}

    def sketches(self, name: str) -> Tensor:
        """[n, dim] float32 or bfloat16, memory-mapped; what is written to it does not reach the disk.

        Raises:
            StoreError: if its bytes are not those that were stored, naming tensor and block.
        """
        if name not in self._verified:
            index = self._index[name]
            dim, dtype = self.manifest.tensors[index].dim, DTYPES[self.manifest.settings.dtype]
            checksums = [block["sha256"]["sketches"][index] for block in self._blocks]
            self._verified[name] = self._read(sketch_path(self.path, index), dim, dtype, checksums, name)
        return self._verified[name]

    @cached_property
    def q(self) -> dict[str, Tensor]:
        """`|g_i|^2` of the whole gradients by tensor, [n] float64.

        Raises:
            StoreError: if their bytes are not those that were stored, naming the block.
        """
        checksums = [block["sha256"]["squared_norms"] for block in self._blocks]
        names = [tensor.name for tensor in self.manifest.tensors]
        values = self._read(self.path / SQUARED_NORMS, len(names), torch.float64, checksums, "the squared norms")
        return {name: values[:, index].contiguous() for index, name in enumerate(names)}

    def squared_norms(self, name: str) -> Tensor:
        """`|g_i|^2` of one tensor, [n] float64; raises as `q` does."""
        return self.q[name]

    def verify(self, names: Iterable[str]) -> None:
        """Hashes the rows of some tensors, and all squared norms, unless that has been done.

        Raises:
            StoreError: if their bytes are not those that were stored, naming tensor and block.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets go of the interpreter
            for _ in pool.map(self.sketches, names):
                pass
        _ = self.q

    def _read(self, path: Path, columns: int, dtype: torch.dtype, checksums: list[str], what: str) -> Tensor:
        check_size(path, self.rows * columns * dtype.itemsize, what)
        values = mapped(path, self.rows, columns, dtype)
        counts = [entry.rows for entry in self.manifest.blocks]
        for number, (part, checksum) in enumerate(zip(values.split(counts), checksums, strict=True)):
            if sha256_of(part) != checksum:
                raise StoreError(f"{path}: damaged (block {number} of {what}: its checksum differs); {REMEDY}")
        return values

    def check(self, model: str, settings: StoreSettings, samples: SampleSet, maps: Mapping[str, MapOfTensor]) -> range:
        """Refuses a store that cannot answer for these samples.

        Args:
            model: fingerprint of the weights.
            settings: of the run.
            samples: whose sketches are asked for; they begin with those that the store holds.
            maps: of the tensors that are asked for, some of the store's; all of them where samples are to be added.

        Returns:
            Positions of the samples that one more pass has to visit, none where the store answers for all of them. A
            build that was interrupted is gone through from its beginning: see `StoredSketches.resume_point`.

        Raises:
            StoreError: saying what differs.
        """
        self.check_origin(model, settings, maps)
        known, total = self.manifest, self.manifest.samples
        if len(samples) < total:
            raise StoreError(
                f"{self.path}: is of {total} samples, {samples.source} has {len(samples)}; "
                "give the samples that it was made from, with or without others after them, or another --store"
            )
        for row, position in enumerate(self.positions.tolist()):
            if self.fingerprints[row] != sample_fingerprint(samples[position]):
                raise StoreError(
                    f"{self.path}: made from another data set (sample {position} was {self.ids[row]} and is "
                    f"{samples[position].id}, of other tokens); give what it was made from, or another --store"
                )
        if known.segments and not known.complete:
            begin = total - known.segments[-1].samples
            same = samples[begin:total].fingerprint == known.segments[-1].fingerprint
            if len(samples) != total or not same:
                differ = "are others" if len(samples) == total else f"are {len(samples)}"
                raise StoreError(
                    f"{self.path}: is unfinished, of {total} samples, and those of {samples.source} {differ}; "
                    "finish it with the samples it was begun with, or give another --store"
                )
            self.check_scope(maps)
            return range(begin, total)
        if len(samples) > total:
            self.check_scope(maps)
        return range(total, len(samples))

    def check_scope(self, maps: Mapping[str, MapOfTensor]) -> None:
        """Refuses to write to some of the tensors only: rows are added to all of them or to none.

        Raises:
            StoreError: naming a tensor that is left out.
        """
        if extra := [name for name in self.tensors if name not in maps]:
            raise StoreError(
                f"{self.path}: holds sketches of {extra[0]}, which is out of scope; give the --include and "
                "--exclude that it was made with, or another --store"
            )

    def check_origin(self, model: str, settings: StoreSettings, maps: Mapping[str, MapOfTensor]) -> None:
        """Refuses a store that was made from another model, with other settings, or without some of the tensors.

        Raises:
            StoreError: saying what differs.
        """
        if found := differences({"model": self.manifest.model}, {"model": model}):
            raise StoreError(f"{self.path}: made from another model ({found}); give that, or another --store")
        if found := differences(vars(self.manifest.settings), vars(settings)):
            raise StoreError(f"{self.path}: made with other settings ({found}); give those, or another --store")
        held = self.tensors
        for name, to in maps.items():
            if name not in held:
                raise StoreError(f"{self.path}: holds no sketches of {name}; leave it out, or give another --store")
            if found := differences(vars(held[name]), vars(StoredTensor.of(name, to))):
                raise StoreError(f"{self.path}: {name} was sketched otherwise ({found}); give another --store")
