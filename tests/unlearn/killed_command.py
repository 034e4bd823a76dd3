"""The command, killed at one of its writes: `python -m tests.unlearn.killed_command CALL FLAGS...`."""

import os
import signal
import sys
from collections.abc import Callable

from fillm.unlearn.__main__ import main

calls = 0


def counted(call: Callable[..., object], at: int) -> Callable[..., object]:
    """The call, or the end of this process if it is the `at`-th of those that are counted."""

    def inner(*given: object, **options: object) -> object:
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **options)

    return inner


if __name__ == "__main__":
    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name), int(sys.argv[1])))
    sys.exit(main(sys.argv[2:]))
