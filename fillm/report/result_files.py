"""Result files of benchmarks and their studies: known by columns that no other table has."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from fillm.documents import read_yaml_document
from fillm.errors import RunFolderError

REMEDY = "make the run again, or copy it again from where it is whole"
_NULLS = ["", "nan", "NaN"]  # how a number that is not there is written in a CSV
_PROVENANCE = ("cpu", "commit", "date", "command")
_WORDS = ("family", "mask", *_PROVENANCE)  # digits alone are words here too
_LEVELS = ("forget_low", "forget_high", "retain_start")
_AT_LEVELS = ("retain_at_low", "retain_at_high")
_SUFFIXES = (".parquet", ".csv")  # of two files with the same rows the first has them exactly


@dataclass(frozen=True)
class Kind:
    """What a result file may hold.

    Attributes:
        name: of its figures' data.
        command: as `Run.command`.
        words: columns of text, without gaps.
        numbers: columns of numbers, without gaps.
        gaps: columns of numbers in which one may be missing.
    """

    name: Literal["compression", "rates", "masks", "quality", "layers", "shifts", "curvatures"]
    command: Literal["compression", "experiment"]
    words: tuple[str, ...]
    numbers: tuple[str, ...]
    gaps: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All that it is known by."""
        return (*self.words, *self.numbers, *self.gaps)


KINDS = (
    Kind("compression", "compression", ("workload", "method", "kind"), (), ("k", "store_bytes")),
    Kind("rates", "experiment", ("choice", "loss"), ("seed", "lr", "steps", *_LEVELS), _AT_LEVELS),
    Kind("masks", "experiment", ("family", "choice", "loss"), ("seed", *_LEVELS), _AT_LEVELS),
    Kind("quality", "experiment", ("choice", "loss"), ("seed", "forget_quality", "model_utility")),
    Kind("layers", "experiment", ("family", "layer", "loss"),
         ("seed", "steps", "forget_start", "forget_end", "retain_start", "retain_end")),
    Kind("shifts", "experiment", ("family", "tensor", "kind"), ("seed", "layer", "relative_shift")),
    Kind("curvatures", "experiment", ("family", "scope", "one", "other"), ("seed", "retain_samples"), ("spearman",)),
)  # fmt: skip


def kind_of(columns: Iterable[str]) -> Kind | None:
    """The kind that has these columns, among others."""
    there = set(columns)
    return next((kind for kind in KINDS if set(kind.columns) <= there), None)


def rows_of(runs: Sequence[Any], *names: str) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Of every run that has such tables: the run, and the rows of one.

    Args:
        runs: of `fillm.report.runs`.
        names: of the kinds that are asked for.
    """
    return [
        (run, table.to_pylist())
        for run in runs
        if run.command in ("experiment", "compression")
        for table in run.tables.values()
        if (kind := kind_of(table.column_names)) is not None and kind.name in names
    ]


def read_result(path: Path) -> tuple[Kind, pa.Table]:
    """The rows of a `.csv` or `.parquet` file, and what they are.

    Raises:
        RunFolderError: one line: not readable, of no kind, without rows, or with something else than its columns hold.
    """
    if path.suffix not in _SUFFIXES:
        raise RunFolderError(f"{path}: give a run folder, or a .parquet or .csv file of results")
    table = _table(path)
    kind = kind_of(table.column_names)
    if kind is None:
        raise RunFolderError(f"{path}: not the results of a study that can be reported; {expected()}")
    if table.num_rows == 0:
        raise RunFolderError(f"{path}: has no rows; let its benchmark finish")
    for name in (*kind.words, *kind.numbers, *kind.gaps):
        _check(path, table, name, words=name in kind.words, gaps=name in kind.gaps)
    return kind, table


def expected() -> str:
    """What is known, in a part of a line."""
    shown = {kind.name: ", ".join(kind.columns) for kind in KINDS}
    return "known are " + "; ".join(f"{name} ({columns})" for name, columns in shown.items())


def results_in(folder: Path) -> tuple[list[Path], list[str]]:
    """The result files of a folder that are known, by name, and the names of those that are not.

    A `.parquet` stands for the `.csv` of the same name beside it.

    Raises:
        RunFolderError: one line, if one cannot be read.
    """
    try:
        files = [path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES and path.is_file()]
    except OSError as error:
        raise _unreadable(folder, error) from None
    files = [path for path in files if path.suffix == _SUFFIXES[0] or path.with_suffix(_SUFFIXES[0]) not in files]
    known = [path for path in files if kind_of(_columns(path)) is not None]
    return known, [path.name for path in files if path not in known]


def made_by(table: pa.Table) -> dict[str, str]:
    """What metadata and last columns say of where and how the rows were made."""
    metadata = table.schema.metadata or {}
    made = {key.decode(): value.decode() for key, value in metadata.items() if key != b"ARROW:schema"}
    for column in _PROVENANCE:
        if column in table.column_names and column not in made:
            made[column] = str(table[column][0].as_py())
    return made


def experiment_of(path: Path) -> dict[str, str]:
    """Title, claim and source of the experiment that a file's rows are of; empty where nothing tells them.

    They stand in NAME.yaml, which is looked for beside NAME.csv and in a folder `experiments` up to three folders
    above, where `python -m benchmarks.experiment` reads it and writes.
    """
    name = f"{path.stem}.yaml"
    for place in (path.parent / name, *(parent / "experiments" / name for parent in path.parents[:3])):
        try:
            told = read_yaml_document(place)
        except (OSError, ValueError):
            continue
        if isinstance(told, dict) and isinstance(told.get("study"), str):
            return {key: " ".join(str(told[key]).split()) for key in ("title", "claim", "source") if told.get(key)}
    return {}


def _columns(path: Path) -> list[str]:
    try:
        if path.suffix == ".parquet":
            return pq.read_schema(path).names
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])
    except (pa.ArrowException, OSError, UnicodeError, csv.Error) as error:
        raise _unreadable(path, error) from None


def _table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path, page_checksum_verification=True)
        kind = kind_of(_columns(path))
        words = dict.fromkeys((*_WORDS, *(kind.words if kind else ())), pa.string())
        options = pa.csv.ConvertOptions(null_values=_NULLS, strings_can_be_null=True, column_types=words)
        return pa.csv.read_csv(path, pa.csv.ReadOptions(use_threads=False), convert_options=options)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> RunFolderError:
    return RunFolderError(f"{path}: cannot be read ({' '.join(str(error).split())}); {REMEDY}")


def _check(path: Path, table: pa.Table, name: str, words: bool, gaps: bool) -> None:
    column = table[name]
    what = "text" if words else "numbers"
    right = pa.types.is_string if words else _is_number
    if not (right(column.type) or (gaps and pa.types.is_null(column.type))):
        raise RunFolderError(f"{path}: column {name} holds {column.type}, not {what}; {REMEDY}")
    if not gaps and column.null_count:
        row = column.is_null().to_pylist().index(True) + 1
        raise RunFolderError(f"{path}: row {row} has no {name}; {REMEDY}")


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
