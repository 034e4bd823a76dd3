"""What a run's files have to hold for the figures: looked at once, on reading, so that no figure has to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from fillm.errors import RunFolderError

_NUMBERS = {
    "rank": ("ranking", ("layer", "score")),
    "unlearn": ("log", ("step", "forget_loss", "retain_loss")),
    "finetune": ("log", ("step", "loss")),
}
_TEXTS = ("name", "kind")  # of a ranking


def check_settings(path: Path, record: Mapping[str, Any], remedy: str) -> None:
    """Settings are plain values or lists of text, fingerprints text.

    Raises:
        RunFolderError: naming the entry; ends with `remedy`.
    """
    for name, value in record["settings"].items():
        listed = isinstance(value, list) and all(isinstance(word, str) for word in value)
        if not (isinstance(name, str) and (listed or value is None or isinstance(value, bool | int | float | str))):
            raise _strange(path, f"settings, {name}", remedy)
    prints = record.get("fingerprints")
    if prints is not None and not isinstance(prints, Mapping):
        raise _strange(path, "fingerprints", remedy)
    for name, value in (prints or {}).items():
        if not isinstance(value, str | None):
            raise _strange(path, f"fingerprints, {name}", remedy)


def check_summary(path: Path, command: str, summary: Mapping[str, Any], remedy: str) -> None:
    """What a command says of its run has the entries that it writes.

    Raises:
        RunFolderError: naming the entry; ends with `remedy`.
    """
    if command == "rank":
        for name in ("method", "objective", "granularity"):
            if not isinstance(summary.get(name), str):
                raise _strange(path, name, remedy)
    elif command == "unlearn":
        if not _is_number(summary.get("kept_step")):
            raise _strange(path, "kept_step", remedy)
        for name in ("forget_loss", "retain_loss"):
            sides = summary.get(name)
            if not isinstance(sides, Mapping) or not all(_is_number(sides.get(when)) for when in ("before", "after")):
                raise _strange(path, name, remedy)
    notes = summary.get("notes")
    if command == "evaluate" and notes is not None and not isinstance(notes, Mapping):
        raise _strange(path, "notes", remedy)


def check_table(path: Path, command: str, table: pa.Table, remedy: str) -> None:
    """The table that figures of a command draw has its columns, of the types that are drawn.

    Raises:
        RunFolderError: naming the column; ends with `remedy`.
    """
    name, numbers = _NUMBERS.get(command, ("", ()))
    if path.stem != name:
        return
    for column in numbers:
        found = table.schema.field(column).type if column in table.column_names else None
        if found is None or not (pa.types.is_integer(found) or pa.types.is_floating(found)):
            raise _strange(path, f"column {column}", remedy)
    for column in _TEXTS if command == "rank" else ():
        found = table.schema.field(column).type if column in table.column_names else None
        if found is None or not (pa.types.is_string(found) or pa.types.is_large_string(found)):
            raise _strange(path, f"column {column}", remedy)


def _is_number(value: Any) -> bool:
    """Beyond 64 bits nothing is drawn."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def _strange(path: Path, what: str, remedy: str) -> RunFolderError:
    return RunFolderError(f"{path}: damaged ({what} is missing, or not what fillm writes); {remedy}")
