"""Kills builds of a store at every call that reaches the disk, continues them, and compares; run as a process.

It forks once for every call, which a process with threads must not do, and leaves out the flushing, which takes long
and which SIGKILL does not depend on.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fillm.errors import StoreError
from fillm.statistics import SketchStore, holds_store, store_writer
from tests.statistics.store_feed import MAPS, all_bytes, build, expected_rows

CALLS = ("pwrite", "fsync", "replace", "truncate", "unlink", "mkdir")
FIRST, ALL = 7, 11


class Killer:
    """Counts the calls that reach the disk, and kills the process at the `at`-th, halfway through if it writes."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> "Killer":
        self._real = {name: getattr(os, name) for name in CALLS}
        self._write_text = Path.write_text
        for name in CALLS:
            setattr(os, name, self._counted(name))
        Path.write_text = lambda path, text, **options: self._counted_text(path, text, **options)
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
        Path.write_text = self._write_text

    def _due(self) -> bool:
        self.count += 1
        return self.count == self.at

    def _counted(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            if self._due():
                if name == "pwrite":
                    self._real[name](given[0], given[1][: len(given[1]) // 2], given[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else self._real[name](*given, **options)

        return call

    def _counted_text(self, path: Path, text: str, **options: Any) -> int:
        if self._due():
            self._write_text(path, text[: len(text) // 2], **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return self._write_text(path, text, **options)


def grow(path: Path) -> None:
    """A build and an append, from wherever they stand."""
    if not (holds_store(path) and SketchStore.open(path).manifest.samples > FIRST):
        build(path, FIRST)
    build(path, ALL)


def in_a_child(path: Path, at: int | None) -> bool:
    """Whether a child that is to be killed at a call came to the end before it."""
    child = os.fork()
    if child == 0:
        with Killer(at):
            grow(path)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def readable(path: Path, full: SketchStore) -> str:
    """What is wrong with what a reader finds in a killed build, nothing if it finds whole blocks."""
    if not holds_store(path):
        return ""
    try:
        found = SketchStore.open(path)
    except StoreError as error:
        return str(error)
    same = found.ids == full.ids[: found.rows]
    for name in MAPS:
        same = same and torch.equal(found.sketches(name), full.sketches(name)[: found.rows])
        same = same and torch.equal(found.q[name], full.q[name][: found.rows])
    return "" if same else f"{found.rows} rows differ"


def main(folder: Path) -> dict[str, Any]:
    """Every call of a build and an append, then builds that are killed again and again."""
    store_writer.BLOCK_SAMPLES = 3
    with Killer(None) as counter:
        grow(folder / "whole")
    whole, full = all_bytes(folder / "whole"), SketchStore.open(folder / "whole")
    for name in MAPS:
        assert torch.equal(full.sketches(name), expected_rows(name, full.positions.tolist(), torch.float32))
    wrong: list[str] = []
    rows: set[int] = set()
    for at in range(1, counter.count + 1):
        path = folder / f"killed{at}"
        if in_a_child(path, at):
            wrong.append(f"call {at} never came")
        if complaint := readable(path, full):
            wrong.append(f"killed at call {at}: {complaint}")
        rows.add(SketchStore.open(path).rows if holds_store(path) else 0)
        with Killer(None):
            grow(path)
        if all_bytes(path) != whole:
            wrong.append(f"continued after a kill at call {at}: other bytes")
    draw, kills = random.Random(0), 0
    for number in range(10):
        path = folder / f"harried{number}"
        while not in_a_child(path, draw.randint(1, 60)):
            kills += 1
        if all_bytes(path) != whole:
            wrong.append(f"harried {number}: other bytes")
    return {
        "calls": counter.count,
        "blocks": len(full.manifest.blocks),
        "rows": sorted(rows),
        "kills": kills,
        "wrong": wrong,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]))))
