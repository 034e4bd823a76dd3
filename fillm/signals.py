"""Handlers of signals, set for a while and for this process alone."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handled(handlers: Mapping[int, Callable[[int], None]]) -> Iterator[None]:
    """Inside, signals call these, and afterwards what they called before; in the main thread only.

    Processes that a library forks meanwhile (a pool, which ends its workers by SIGTERM) take them as if nothing had
    been set: a worker that did not die of it would be waited for without end.

    Args:
        handlers: by the signal's number, what is called with it.
    """
    own = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() == own:
            handlers[number](number)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in handlers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
