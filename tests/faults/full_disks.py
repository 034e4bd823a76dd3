"""Runs commands on a disk that is too small for them, then makes it larger and finishes them with `--resume`.

A process of its own, since it forks and mounts: `unshare -rm python -m tests.faults.full_disks FOLDER < CASES` prints
as JSON what every run said, its exit status, and which files differ in the end from those of a run that had room. A
case is `{"name", "command", "arguments", "shares"}`: the disks have these shares of the room that a whole run leaves
taken; 0 is a large one that may only be read.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.forks import child, digests, preload, prepare

LARGE = 1 << 26


def mounted(at: Path, size: int, *options: str) -> Path:
    """A disk of so many bytes at a folder that is made for it; with `remount` the one that is there."""
    at.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(at)]
    subprocess.run(words, check=True, capture_output=True)
    return at


def most_used(at: Path) -> int:
    """Bytes of a disk that are taken."""
    room = os.statvfs(at)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def cramped(folder: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs one case on every disk."""

    def arguments(at: Path) -> list[str]:
        return [word.replace("{at}", str(at)) for word in case["arguments"]]

    whole, messages, told = mounted(folder / case["name"] / "whole", LARGE), folder / "messages", []
    preload(case["command"], arguments(whole), messages)
    wanted, room = digests(whole), most_used(whole)
    for share in case["shares"]:
        read_only = share == 0
        at = mounted(folder / case["name"] / str(share), LARGE if read_only else int(room * share))
        if read_only:
            mounted(at, LARGE, "remount", "ro")
        status = child(case["command"], arguments(at), messages=messages)
        said = messages.read_text(encoding="utf-8").splitlines()
        half = (at / "run").exists()
        mounted(at, LARGE, "remount", "rw")
        again = child(case["command"], [*arguments(at), "--resume"], messages=messages)
        found = digests(at)
        differ = [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
        end = messages.read_text(encoding="utf-8").splitlines()[-10:] if again else []
        told.append(
            {"share": share, "status": status, "said": said, "half": half, "again": again, "end": end, "differ": differ}
        )
    return told


if __name__ == "__main__":
    prepare()
    cases = json.load(sys.stdin)
    print(json.dumps({case["name"]: cramped(Path(sys.argv[1]), case) for case in cases}))
