"""SIGINT and SIGTERM as a question that the training loop asks after every step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT and SIGTERM are only noted; a second one acts as it did before.

    Yields:
        A function that says whether one has come. Outside the main thread, where python allows no handlers, it always
        says no.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        noted.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield noted.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
