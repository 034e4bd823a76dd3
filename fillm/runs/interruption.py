"""SIGINT and SIGTERM as a question that a loop asks wherever it could stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fillm.signals import handled


@contextmanager
def signals_noted() -> Iterator[Callable[[], str | None]]:
    """Inside, SIGINT and SIGTERM are only noted; a second one acts as it did before.

    Yields:
        A function that names the signal that has come, None while there is none. Outside the main thread, where python
        allows no handlers, there never is.
    """
    noted: list[str] = []

    def name() -> str | None:
        return noted[0] if noted else None

    if threading.current_thread() is not threading.main_thread():
        yield name
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int) -> None:
        noted.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    with handled(dict.fromkeys(before, note)):
        yield name
