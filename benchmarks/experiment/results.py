"""The rows of an experiment as CSV, a line as soon as it is known."""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.results import commit, processor

Record = dict[str, Any]
CASE = ("family", "seed")
MADE = ("cpu", "commit", "command")


class Rows:
    """A CSV that grows by whole lines, and what is in it.

    Args:
        path: the file.
        columns: of the study.
        command: that makes it; lines of another command are not continued.
        resume: keep the lines that are there.
    """

    def __init__(self, path: Path, columns: Sequence[str], command: str, resume: bool) -> None:
        self.path, self._columns = path, (*CASE, *columns, *MADE)
        self._made = {"cpu": processor(), "commit": commit(), "command": command}
        self.records: list[Record] = []
        if resume and path.exists():
            self.records = [row for row in read(path) if row["command"] == command]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            self._writer(file).writeheader()
            self._writer(file).writerows(_cells(record) for record in self.records)
        os.replace(partial, path)

    def of(self, family: str, seed: int) -> list[Record]:
        """The rows of one model."""
        return [row for row in self.records if row["family"] == family and row["seed"] == seed]

    def add(self, record: Record) -> None:
        """Appends one line."""
        record = {**record, **self._made}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            self._writer(file).writerow(_cells(record))
        self.records.append(_plain(_cells(record)))

    def _writer(self, file: Any) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self._columns, lineterminator="\n")


def read(path: Path) -> list[Record]:
    """The rows of such a file; what is a number comes as one."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_plain(row) for row in csv.DictReader(file)]


def _cells(record: Record) -> dict[str, str]:
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in record.items()}


def _plain(row: dict[str, str]) -> Record:
    return {name: value if name in ("family", *MADE) else _number(value) for name, value in row.items()}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def finite(values: Sequence[Any]) -> list[float]:
    """The numbers among some values that are finite."""
    return [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
