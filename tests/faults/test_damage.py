"""Every region of every file that is read back, spoilt: refused by name, or what is read is the same.

Masks: tests/masks/test_mask_files.py; every call of a writer of stores: tests/statistics/test_store_kills.py.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fillm.errors import FillmError
from fillm.evaluate.reference import load_reference
from fillm.rank.ranking import Ranking
from fillm.report.runs import load_run
from fillm.runs import RunFolder
from fillm.statistics import SketchStore


def plain(value: Any) -> Any:
    """Something that equals itself: tables and tensors as lists, NaN by its name."""
    if isinstance(value, torch.Tensor):
        return repr(value.tolist())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return repr(value.to_pydict()) if hasattr(value, "to_pydict") else repr(value)


def ranking(folder: Path) -> Any:
    found = Ranking.load(folder)
    tables = [found.table, found.samples, found.per_sample, found.tensors]
    told = [found.method, found.objective, found.granularity, found.settings, found.record]
    return [plain(one) for one in (*tables, *told, dict((found.updates or {}).items()))]


def store(folder: Path) -> Any:
    found = SketchStore.open(folder)
    rows = {name: found.sketches(name) for name in found.tensors}
    return [plain(one) for one in (found.manifest, found.ids, found.positions, found.losses, found.q, rows)]


def reference(folder: Path) -> Any:
    found = load_reference(str(folder))
    return [plain(one) for one in (found.settings, found.fingerprints, found.summary, found.rows)]


def reported(folder: Path) -> Any:
    found = load_run(folder)
    return [plain(one) for one in (found.command, found.record, dict(found.tables), found.summary)]


def state(folder: Path) -> Any:
    with RunFolder(folder.parent / "run", overwrite=False, resume=True) as held:
        held.check_identity({"model": "m", "--lr": "0.1"})
        found = [plain(held.load_state()), plain(held.load_stage("forget"))]
    return found


def unfinished(folder: Path) -> None:
    """A run that was stopped."""
    with RunFolder(folder, overwrite=False, resume=False) as held:
        held.check_identity({"model": "m", "--lr": "0.1"})
        held.save_stage("forget", {"sum": torch.arange(20.0)}, {"losses": [0.5]})
        held.save_state("retain", 3, {"sum": torch.arange(30.0)}, {"seconds": 1.5})
        held.save_stage("kept", {"x": torch.ones(1)}, {})
        held.save_state("retain", 3, {"sum": torch.arange(30.0)}, {"seconds": 1.5})


def spoilt(data: bytes, flips: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Changed bytes, and what was done to them: one bit in each of so many regions and at both ends, cut short, ..."""
    size = len(data)
    places = {0, 8, size - 1} | {draw.randrange(size * n // flips, size * (n + 1) // flips or 1) for n in range(flips)}
    for at in sorted(place for place in places if place < size):
        bit = 1 << draw.randrange(8)
        yield f"bit {bit} of byte {at}", data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    for at in {0, size // 3, size // 2, size - 1}:
        yield f"cut at {at}", data[:at]
    half = size // 2
    yield "zeros", data[:half] + bytes(len(data[half : half + 64])) + data[half + 64 :]
    yield "taken out", data[:half] + data[half + 1 :]
    yield "put in", data[:half] + b"0" + data[half:]
    yield "more", data + b"\n0"


READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ranking": (ranking, "rank"),
    "store": (store, "rank with a store"),
    "reference": (reference, "evaluate"),
    "report of a ranking": (reported, "rank"),
    "report of an unlearning": (reported, "unlearn"),
    "report of an evaluation": (reported, "evaluate"),
    "report of a training": (reported, "finetune"),
    "state": (state, ""),
}
# What no reader looks at: weights are the business of whoever loads the model.
UNREAD = ("lock", "heatmap.png", "mask.safetensors", "model.safetensors", "config.json", "generation_config.json",
          "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # fmt: skip


def spoil_all(reader: str, runs: dict[str, Path], work: Path, flips: int) -> None:
    read, made_by = READERS[reader]
    if made_by:
        folder = Path(shutil.copytree(runs[made_by] / ("store" if reader == "store" else "run"), work / "whole"))
    else:
        unfinished(work / "run")
        folder = work / "run.partial"
    kept = Path(shutil.copytree(folder, work / "kept"))
    whole, draw, wrong, refused = read(folder), random.Random(reader), [], 0
    files = [path.relative_to(kept) for path in sorted(kept.rglob("*")) if path.is_file() and path.name not in UNREAD]
    for name in files:
        for how, data in spoilt((kept / name).read_bytes(), flips, draw):
            (folder / name).write_bytes(data)
            try:
                same = read(folder) == whole
                if not same:
                    wrong.append(f"{name}, {how}: other values")
            except FillmError as error:
                refused += 1
                if "\n" in str(error) or str(folder) not in str(error):
                    wrong.append(f"{name}, {how}: {error}")
            except Exception as error:
                wrong.append(f"{name}, {how}: {type(error).__name__}: {error}")
            if not made_by:  # what a run has taken away or written
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(kept, folder)
            (folder / name).write_bytes((kept / name).read_bytes())
    assert wrong == []
    assert refused > len(files)
    assert read(folder) == whole


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_never_gives_other_values(reader, runs, tmp_path):
    spoil_all(reader, runs, tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_no_region_is_left_out(reader, runs, tmp_path):
    spoil_all(reader, runs, tmp_path, 64)
