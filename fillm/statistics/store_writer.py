"""Sketches of a data set's gradients, written to disk while a pass goes on: what is stored survives any end of it.

A block is one stretch of rows in every file. Its rows are written and flushed first, then its record, then, atomically,
the manifest that names it: a block is part of the store from that moment on, and not before. Whatever lies beyond what
the manifest names is cut off when writing goes on.
"""

import dataclasses
import fcntl
import os
from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor

from fillm.capture import PerSampleGradients
from fillm.data import SampleSet
from fillm.errors import StoreError
from fillm.paths import expanded
from fillm.runs.state_files import file_sha256, sync, write_json
from fillm.statistics.store import SketchStore, holds_store
from fillm.statistics.store_block import OpenBatch, OpenBlock
from fillm.statistics.store_format import (
    BLOCKS,
    DTYPES,
    LOCK,
    MANIFEST,
    BlockEntry,
    Manifest,
    MapOfTensor,
    Segment,
    StoredTensor,
    StoreSettings,
    block_path,
    storing,
)
from fillm.statistics.store_rows import SKETCHES, row_files, write_rows

# A block ends after the batch that brings it to either.
BLOCK_BYTES = 1 << 26
BLOCK_SAMPLES = 1024


def refuse_foreign(path: str | os.PathLike[str]) -> None:
    """Never fill a folder that no store has been begun in.

    Raises:
        StoreError: if it holds something else, or is a file.
    """
    folder = expanded(path)
    if holds_store(folder) or not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder}: is not a folder; give another --store")
    with storing(folder):
        if {entry.name for entry in folder.iterdir()} - {LOCK, f"{MANIFEST}.tmp"}:
            raise StoreError(f"{folder}: is not a sketch store (no {MANIFEST}); give another --store")


def refuse_read_only(path: str | os.PathLike[str]) -> None:
    """No pass is to end with sketches that cannot be written.

    Raises:
        StoreError: if the folder, or the one that it would be made in, may not be written to.
    """
    there = expanded(path).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(f"{path}: cannot write into {there}; give another --store")


class StoredSketches:
    """The statistic that a pass feeds: makes a store, continues one that was interrupted, or adds to one.

    Held exclusively from construction until `release`; readers may open the store at any time. It keeps its own state:
    a pass asks `resume_point` where to begin and hands over every finished batch with `end_of_batch`.

    Args:
        path: the folder; made if there is none.
        maps: of the tensors in scope, by name.
        samples: the whole data set; it begins with what the store holds already.
        model: fingerprint of the weights.
        settings: what all sketches share.

    Attributes:
        positions: of the samples that the pass has to visit; none where the store is complete.

    Raises:
        StoreError: if another writer holds the store, if it was made from something else, is damaged or is no store, or
            if the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        maps: Mapping[str, MapOfTensor],
        samples: SampleSet,
        model: str,
        settings: StoreSettings,
    ) -> None:
        self.path, self.maps, self.samples = expanded(path), dict(maps), samples
        self._lock: int | None = None
        self._dtype = DTYPES[settings.dtype]
        with storing(self.path):
            refuse_foreign(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                if not holds_store(self.path):
                    tensors = tuple(StoredTensor.of(name, to) for name, to in maps.items())
                    write_json(self.path / MANIFEST, Manifest(model, settings, tensors).record())
                    sync(self.path.parent)
                self._stored = SketchStore.open(self.path)
                self.positions = self._stored.check(model, settings, samples, maps)
                self._stored.check_scope(maps)
                self._make_ready()
            except BaseException:
                self.release()
                raise
        self._manifest = self._stored.manifest
        self._batch, self._block = OpenBatch(self.maps, self._dtype), OpenBlock(self.maps)
        self._begin()

    def _acquire(self) -> None:
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise StoreError(f"{self.path}: another run writes to it; wait for it, or give another --store") from None

    def _make_ready(self) -> None:
        """Removes what an interrupted block has left."""
        manifest = self._stored.manifest
        for folder in (SKETCHES, BLOCKS):
            (self.path / folder).mkdir(exist_ok=True)
        for file, size, _ in row_files(self.path, manifest):
            if file.exists() and file.stat().st_size != manifest.rows * size:
                os.truncate(file, manifest.rows * size)
        known = {block_path(self.path, number) for number in range(len(manifest.blocks))}
        for file in {*(self.path / BLOCKS).iterdir()} - known:
            file.unlink()
        (self.path / f"{MANIFEST}.tmp").unlink(missing_ok=True)

    def _begin(self) -> None:
        """Enters the segment in hand, unless it has been begun; the next manifest that is written names it."""
        begun = self._manifest.segments and not self._manifest.segments[-1].complete
        if begun or not len(self.positions):
            return
        joint = self.samples[self.positions.start : self.positions.stop].fingerprint
        segment = Segment(samples=len(self.positions), fingerprint=joint, batches=0, complete=False)
        self._manifest = dataclasses.replace(self._manifest, segments=(*self._manifest.segments, segment))

    def resume_point(self, batches: Sequence[Sequence[int]]) -> tuple[int, Tensor, dict[str, str]]:
        """Where the pass has to begin.

        Args:
            batches: positions of the samples of every batch of the pass over `positions`.

        Returns:
            Number of batches that are stored; every stored sample's loss, [samples] float64, 0 for the others; and the
            tensors that the pass had no rule for by then, with why.

        Raises:
            StoreError: if the stored batches were others.
        """
        losses = torch.zeros(len(self.samples), dtype=torch.float64)
        losses[self._stored.positions] = self._stored.losses
        found = self._stored.manifest
        done = found.segments[-1].batches if found.segments and not found.complete else 0
        stored = [p for p in self._stored.positions.tolist() if p >= self.positions.start]
        if [position for batch in batches[:done] for position in batch] != stored:
            raise StoreError(
                f"{self.path}: its unfinished build went through the samples in other batches; give the "
                "--tokens-per-batch that it was begun with, or another --store"
            )
        return done, losses, self._stored.fallback if stored else {}

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Takes one tensor's gradients of a batch, or of a part of it."""
        self._batch.observe(name, gradients, positions)

    def first_not_finite(self, positions: Sequence[int]) -> tuple[str, int] | None:
        """The first tensor of the batch in hand with a NaN or infinite gradient, and the sample."""
        return self._batch.first_not_finite(positions)

    def end_of_batch(self, positions: Sequence[int], losses: Tensor, fallback: Mapping[str, str]) -> None:
        """Adds the batch to the block in hand, and stores that where it is full.

        Args:
            positions: of the batch's samples; a tensor that no gradient of theirs has reached has rows of zeros.
            losses: [B] of each.
            fallback: tensors that the pass has had no rule for so far, and why.

        Raises:
            StoreError: if the disk refuses; what was stored before is then still good.
        """
        self.add_batch(positions, self._batch.take(positions), losses, fallback)

    def add_batch(
        self, positions: Sequence[int], parts: Sequence[Tensor], losses: Tensor, fallback: Mapping[str, str]
    ) -> None:
        """The same of a batch that was observed elsewhere: `parts` is what `OpenBatch.take` gave there."""
        self._block.add(positions, parts, losses, fallback)
        if self._block.nbytes >= BLOCK_BYTES or len(self._block.positions) >= BLOCK_SAMPLES:
            self._store_block(complete=False)

    def close(self) -> None:
        """The pass is over: stores the last block and marks the segment as complete.

        Raises:
            StoreError: if the disk refuses; what was stored before is then still good.
        """
        if not len(self.positions):
            return
        visited = self._manifest.rows + len(self._block.positions)
        if visited != self._manifest.samples:
            raise ValueError(f"{visited} of {self._manifest.samples} samples were visited")
        if self._block.positions:
            self._store_block(complete=True)
        else:
            self._store_manifest(self._manifest.blocks, complete=True)
        self.positions = range(self.positions.stop, self.positions.stop)

    def _store_block(self, complete: bool) -> None:
        path, before = block_path(self.path, len(self._manifest.blocks)), self._manifest.rows
        parts, files = self._block.parts(), list(row_files(self.path, self._manifest))
        with storing(self.path):
            for (file, size, _), part in zip(files, parts, strict=True):
                write_rows(file, part, before * size)
            for file, _, _ in files:  # by now most is on its way to the disk
                sync(file)
            sync(self.path / SKETCHES)
            sync(self.path)
            write_json(path, self._block.record(self.samples, parts))
            entry = BlockEntry(len(self._block.positions), file_sha256(path))
        self._store_manifest((*self._manifest.blocks, entry), complete)
        self._block = OpenBlock(self.maps)

    def _store_manifest(self, blocks: tuple[BlockEntry, ...], complete: bool) -> None:
        *others, last = self._manifest.segments
        last = dataclasses.replace(last, batches=last.batches + self._block.batches, complete=complete)
        manifest = dataclasses.replace(self._manifest, blocks=blocks, segments=(*others, last))
        with storing(self.path):
            write_json(self.path / MANIFEST, manifest.record())
        self._manifest = manifest

    def release(self) -> None:
        """Lets go of the store; what is not in a closed block is computed again when it is continued."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "StoredSketches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
