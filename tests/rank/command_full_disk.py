"""Runs the command with a store on a disk that really refuses, then finishes it with `--resume`.

A process of its own, since it forks and limits its children: `python -m tests.rank.command_full_disk FOLDER LIMITS
ARGUMENTS...` prints as JSON what every refused run said, what the store held then, and which files differ in the end
from those of a run that was let be. `LIMITS` are sizes of a file in bytes, comma-separated: what goes beyond is cut
short by the kernel, and refused after that (EFBIG), as on a disk that fills up. The last limit is followed by a run
with a file of the store on /dev/full (ENOSPC).
"""

import json
import sys
from pathlib import Path
from typing import Any

from fillm.statistics import SketchStore
from tests.faults.forks import child, digests, limit_files, prepare


def run_in_a_fork(arguments: list[str], messages: Path, limit: int | None = None) -> int:
    """Runs the command in a fork, no file of which may outgrow `limit`; its exit status."""
    prepared = None if limit is None else lambda: limit_files(limit)
    return child("rank", arguments, messages=messages, prepared=prepared)


def refused(at: Path, status: int) -> dict[str, Any]:
    """What is there after a run that was refused; every row that the store names is read, and checked."""
    store = SketchStore.open(at / "store")
    for name in store.tensors:
        store.sketches(name)
    lines = (at / "messages").read_text(encoding="utf-8").splitlines()
    return {"status": status, "lines": lines, "rows": store.rows, "run": (at / "run" / "ranking.parquet").exists()}


def run(folder: Path, limits: list[int], arguments: list[str]) -> dict[str, Any]:
    """For every limit, what was said and found, and the files that differ in the end."""
    prepare()

    def command(at: Path) -> list[str]:
        at.mkdir(exist_ok=True)
        return [*arguments, "--store", str(at / "store"), "--out", str(at / "run")]

    whole = folder / "whole"
    assert run_in_a_fork(command(whole), folder / "messages") == 0, (folder / "messages").read_text(encoding="utf-8")
    wanted, out = digests(whole), {"refused": [], "differ": []}
    for limit in limits:
        at = folder / f"limit{limit}"
        out["refused"].append(refused(at, run_in_a_fork(command(at), at / "messages", limit)))
        if limit == limits[-1]:
            file = at / "store" / "sketches" / "0.bin"
            file.unlink()
            file.symlink_to("/dev/full")
            out["refused"].append(refused(at, run_in_a_fork([*command(at), "--resume"], at / "messages")))
            file.unlink()
        assert run_in_a_fork([*command(at), "--resume"], folder / "messages") == 0
        (at / "messages").unlink()
        found = digests(at)
        out["differ"] += [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
    return out


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), [int(size) for size in sys.argv[2].split(",")], sys.argv[3:])))
