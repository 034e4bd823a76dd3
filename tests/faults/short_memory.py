"""Runs a command with less memory than it asks for; a process of its own, since it forks and limits its child.

`python -m tests.faults.short_memory FOLDER < CASES` prints as JSON exit status and last lines of every run, whether it
left half a folder, and whether it ends with the same bytes once it has room and is resumed. A case is
`{"name", "command", "arguments", "rooms"}`: bytes of address space more than the process has taken by then.
"""

import functools
import json
import resource
import sys
from pathlib import Path
from typing import Any

from tests.faults.forks import child, digests, preload, prepare


def limited(room: int) -> None:
    """From now on this process has so many bytes left."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def short(folder: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    """One case, in every room."""

    def arguments(at: str) -> list[str]:
        return [word.replace("{at}", str(folder / case["name"] / at)) for word in case["arguments"]]

    messages, found = folder / "messages", []
    preload(case["command"], arguments("whole"), messages)
    wanted, again = digests(folder / case["name"] / "whole"), 0
    for room in case["rooms"]:
        limit, at = functools.partial(limited, room), f"short{room}"
        status = child(case["command"], arguments(at), messages=messages, prepared=limit)
        said = messages.read_text(encoding="utf-8", errors="replace").splitlines()
        half = status != 0 and (folder / case["name"] / at / "run").exists()
        if status != 0:  # with room again
            again = child(case["command"], [*arguments(at), "--resume"], messages=messages)
        same = again == 0 and digests(folder / case["name"] / at) == wanted
        found.append({"status": status, "said": said[-15:], "half": half, "same": same})
    return found


if __name__ == "__main__":
    prepare()
    print(json.dumps({case["name"]: short(Path(sys.argv[1]), case) for case in json.load(sys.stdin)}))
