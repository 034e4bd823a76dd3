"""The first SIGINT or SIGTERM is noted, the second acts; handlers are put back, and are this process's alone."""

import os
import signal
import threading

import pytest

from fillm.runs import signals_noted
from fillm.signals import handled


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_named_and_the_second_acts(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(1))
    try:
        handler = signal.getsignal(number)
        with signals_noted() as interrupted:
            assert interrupted() is None
            signal.raise_signal(number)
            assert interrupted() == signal.Signals(number).name and acted == []
            signal.raise_signal(number)
            assert acted == [1]
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), signals_noted():
        raise KeyError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_nothing_is_touched():
    before, seen = signal.getsignal(signal.SIGINT), []

    def inside():
        with signals_noted() as interrupted:
            seen.append((interrupted(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_forked_process_dies_of_a_signal_that_is_noted_here(number):
    """A pool ends its workers by SIGTERM and waits for them: one that only noted it was waited for without end."""
    with handled({number: lambda _: None}), signals_noted() as interrupted:
        for _ in range(20):  # some are told before they are ready
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(7)
            os.kill(child, number)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number
        assert interrupted() is None
        signal.raise_signal(number)  # here nothing is held back
        assert interrupted() == signal.Signals(number).name
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
