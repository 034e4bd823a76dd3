"""`--part I/N`: every Nth piece of a long measurement from the Ith, so that several processes share it."""

from collections.abc import Sequence
from typing import TypeVar

from fillm.errors import UsageError

Piece = TypeVar("Piece")


def check_part(part: str | None) -> None:
    """Refuses what is no part.

    Raises:
        UsageError: unless it is None or I/N with I from 1 to N.
    """
    if part is None:
        return
    first, slash, parts = part.partition("/")
    if not (slash and first.isdecimal() and parts.isdecimal() and 1 <= int(first) <= int(parts)):
        raise UsageError(f"--part {part}: give I/N with I from 1 to N")


def part_of(pieces: Sequence[Piece], part: str | None) -> list[Piece]:
    """The pieces of a part that `check_part` takes; all of them for None."""
    if part is None:
        return list(pieces)
    first, parts = map(int, part.split("/"))
    return list(pieces[first - 1 :: parts])
