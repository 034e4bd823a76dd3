"""Handlers of signals, set for a while and for this process alone.

Libraries fork: a pool ends its workers by SIGTERM and waits for them. A worker that inherited a handler might only note
the signal, or lose it: python forgets in a new process what came before it was ready. So a forked process takes these
signals as if nothing had been set, from its first moment: they are held back until that is so.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

_HANDLED: list[int] = []  # numbers, by every `handled` that is open
_FORKING = threading.local()  # what a thread that forks had held back before


@contextmanager
def handled(handlers: Mapping[int, Callable[[int], None]]) -> Iterator[None]:
    """Inside, signals call these, and afterwards what they called before; in the main thread only.

    Args:
        handlers: by the signal's number, what is called with it.
    """

    def handle(number: int, _: FrameType | None) -> None:
        handlers[number](number)

    _HANDLED.extend(handlers)
    before = {number: signal.signal(number, handle) for number in handlers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
            _HANDLED.remove(number)


def _before_a_fork() -> None:
    _FORKING.held_back = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)


def _after_a_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _FORKING.held_back)


def _in_a_forked_process() -> None:
    for number in set(_HANDLED):
        signal.signal(number, signal.SIG_DFL)
    _HANDLED.clear()
    _after_a_fork()


os.register_at_fork(
    before=_before_a_fork,
    after_in_parent=_after_a_fork,
    after_in_child=_in_a_forked_process,
)
