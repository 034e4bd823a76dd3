"""Runs the command with a store again and again, killed at a random write each time, and finishes it with `--resume`.

A process of its own, since it forks: `python -m tests.rank.command_kills FOLDER KILLS ARGUMENTS...` prints as JSON, for
every kill, the names of the files that differ from those of an uninterrupted run.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fillm.rank import ranking_files
from fillm.rank.__main__ import main
from fillm.statistics import store_writer

CALLS = ("fsync", "replace", "pwrite")
MOST_CALLS = 400


def child(arguments: list[str], kill_at: int | None) -> int:
    """Runs the command in a fork; SIGKILL at its `kill_at`-th call that writes. Exit status, or minus the signal."""
    process = os.fork()
    if process == 0:
        calls = 0

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def inner(*given: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*given, **options)

            return inner

        if kill_at is not None:
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that a run leaves, but for the record of when it ran and for the picture."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.yaml", "lock")
    }


def run(folder: Path, kills: int, arguments: list[str]) -> list[list[str]]:
    """For every kill, which files differ in the end; a run that failed is named by its exit status."""
    torch.set_num_threads(1)
    store_writer.BLOCK_SAMPLES = 3
    ranking_files.score_heatmap = lambda *given, **options: None
    draw, out = random.Random(0), []

    def command(name: str) -> list[str]:
        at = folder / name
        return [*arguments, "--store", str(at / "store"), "--out", str(at / "run"), "--checkpoint-seconds", "0.001"]

    assert child(command("whole"), None) == 0
    wanted = digests(folder / "whole")
    for number in range(kills):
        name = f"kill{number}"
        # Late calls do not come: the run is then whole, and another moment is drawn.
        while (status := child(command(name), draw.randrange(1, MOST_CALLS))) == 0:
            shutil.rmtree(folder / name)
        if status == -signal.SIGKILL:
            status = child([*command(name), "--resume"], None)
        found = digests(folder / name) if status == 0 else {f"exit status {status}": ""}
        out.append(sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key)))
        shutil.rmtree(folder / name)
    return out


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
