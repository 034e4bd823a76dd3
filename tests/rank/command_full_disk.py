"""Runs the command with a store on a disk that really refuses, then finishes it with `--resume`.

A process of its own, since it forks and limits its children: `python -m tests.rank.command_full_disk FOLDER LIMITS
ARGUMENTS...` prints as JSON what every refused run said, what the store held then, and which files differ in the end
from those of a run that was let be. `LIMITS` are sizes of a file in bytes, comma-separated: what goes beyond is cut
short by the kernel, and refused after that (EFBIG), as on a disk that fills up. The last limit is followed by a run
with a file of the store on /dev/full (ENOSPC).
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fillm.rank import ranking_files
from fillm.rank.__main__ import main
from fillm.statistics import SketchStore, store_writer
from tests.rank.command_kills import digests


def child(arguments: list[str], messages: Path, limit: int | None = None) -> int:
    """Runs the command in a fork, no file of which may outgrow `limit`; its exit status."""
    process = os.fork()
    if process == 0:
        with open(messages, "w", encoding="utf-8") as said, open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(said.fileno(), 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def refused(at: Path, status: int) -> dict[str, Any]:
    """What is there after a run that was refused; every row that the store names is read, and checked."""
    store = SketchStore.open(at / "store")
    for name in store.tensors:
        store.sketches(name)
    lines = (at / "messages").read_text(encoding="utf-8").splitlines()
    return {"status": status, "lines": lines, "rows": store.rows, "run": (at / "run" / "ranking.parquet").exists()}


def run(folder: Path, limits: list[int], arguments: list[str]) -> dict[str, Any]:
    """For every limit, what was said and found, and the files that differ in the end."""
    torch.set_num_threads(1)
    store_writer.BLOCK_SAMPLES = 3
    ranking_files.score_heatmap = lambda *given, **options: None

    def command(at: Path) -> list[str]:
        at.mkdir(exist_ok=True)
        return [*arguments, "--store", str(at / "store"), "--out", str(at / "run")]

    whole = folder / "whole"
    assert child(command(whole), folder / "messages") == 0, (folder / "messages").read_text(encoding="utf-8")
    wanted, out = digests(whole), {"refused": [], "differ": []}
    for limit in limits:
        at = folder / f"limit{limit}"
        out["refused"].append(refused(at, child(command(at), at / "messages", limit)))
        if limit == limits[-1]:
            file = at / "store" / "sketches" / "0.bin"
            file.unlink()
            file.symlink_to("/dev/full")
            out["refused"].append(refused(at, child([*command(at), "--resume"], at / "messages")))
            file.unlink()
        assert child([*command(at), "--resume"], folder / "messages") == 0
        (at / "messages").unlink()
        found = digests(at)
        out["differ"] += [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
    return out


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), [int(size) for size in sys.argv[2].split(",")], sys.argv[3:])))
