"""The rows of the walk as CSV."""

import csv
import os
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

import torch
import transformers

from benchmarks.architectures.walk import COLUMNS, Record
from fillm.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.csv"
VERSIONS = ("transformers", "torch")


def read(path: Path) -> list[Record]:
    """The rows of such a file, every value as text.

    Raises:
        UsageError: if it is not there or not of this command.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if found and not set(COLUMNS) <= set(found[0]):
        raise UsageError(f"{path}: lacks the columns of this command")
    return found


def write(path: Path, records: Iterable[Record]) -> None:
    """Replaces the file by the records in the order of their model types; new ones get the versions in use."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    text = StringIO()
    writer = csv.DictWriter(text, (*COLUMNS, *VERSIONS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(versions | record for record in sorted(records, key=lambda record: record["model_type"]))
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text.getvalue(), encoding="utf-8")
    os.replace(partial, path)
