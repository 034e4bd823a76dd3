"""What a person hears of the Hugging Face Hub: one line before it is asked, and nothing of its client's attempts."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from functools import cache

from huggingface_hub.constants import HF_HUB_OFFLINE


@cache
def announce(source: str, reason: str) -> None:
    """Says once that the Hub is asked: without a network its client tries for most of a minute before it gives up.

    Args:
        source: what is asked for.
        reason: why it is not had from here.
    """
    if not HF_HUB_OFFLINE and os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(f"{source}: {reason}; asking the Hub", file=sys.stderr)


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Errors alone from the Hub's client, which tells of every attempt to reach a network that is not there.

    Args:
        names: of further loggers to be as quiet.
    """
    before = {logger: logger.level for logger in map(logging.getLogger, ("huggingface_hub", *names))}
    for logger in before:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
