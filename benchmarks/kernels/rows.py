"""Rows of a kernel benchmark as a CSV that says on what and from which commit they were made."""

import csv
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end.results import commit, processor


def save(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows, each with machine, versions, commit and date; nothing without a path."""
    if path is None:
        return
    made = {
        "cpu": processor(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    columns = list(dict.fromkeys([*(name for row in rows for name in row), *made]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({**row, **made} for row in rows)
