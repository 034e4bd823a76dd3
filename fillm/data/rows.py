"""From a data spec, or rows already in memory, to rows that know where they came from."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fillm.data.fictional import fictional_rows
from fillm.data.files import SKIPPABLE, Record, read_records
from fillm.data.published import load_from_hub, read_benchmark
from fillm.data.specs import DataSpec, parse_spec
from fillm.errors import DataError, UsageError

if TYPE_CHECKING:
    import datasets

IN_MEMORY = "rows"


@dataclass(frozen=True)
class Row:
    """One row of a data set, not yet tokenised.

    Attributes:
        fields: the row as read; keys other than those that are tokenised are kept.
        source: the spec without its slice, a file path, or `rows` for rows given in memory.
        number: position in the data set before slicing, from 0.
        line: line in the file, from 1; None where the format has no lines (JSON arrays, Parquet, benchmarks).
        fault: why the row could not be read, where such rows are to be counted and left out; then it has no fields.
    """

    fields: dict[str, Any]
    source: str
    number: int
    line: int | None = None
    fault: str | None = None

    @property
    def id(self) -> str:
        """Stable name of the row, such as `tofu:full#3961`; the number counts from 0, as slices do."""
        return f"{self.source}#{self.number}"

    @property
    def where(self) -> str:
        """The row as error messages name it; lines and rows count from 1 there."""
        return f"{self.source}, " + (f"line {self.line}" if self.line is not None else f"row {self.number + 1}")


def load_rows(
    spec: "str | os.PathLike[str] | datasets.Dataset | Sequence[Mapping[str, Any]]",
    *,
    data_root: str | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> list[Row]:
    """All rows of a data spec, a `datasets.Dataset` or a sequence of mappings, sliced if the spec says so.

    Args:
        spec: see docs/data.md. A list of `Row` is taken as it is.
        data_root: folder for `tofu:` and `knowundo:`; None stands for the environment variable FILLM_DATA.
        seed: which fictional authors `fictional:` means; other specs do not depend on it. Not the seed of a run: a
            model that learned one seed's authors knows nothing of another's.
        skip_bad_rows: rows that cannot be read become rows with a `fault`, which `tokenize_rows` counts and lists.

    Returns:
        At least one row, in the order of the data set.

    Raises:
        DataError: if the spec, its split, slice or file cannot be used.
        UsageError: if the data root is no folder.
    """
    if isinstance(spec, (str, os.PathLike)):
        parsed = parse_spec(os.fspath(spec))
        source, records = parsed.base, _read(parsed, data_root, seed, skip_bad_rows)
        kept = parsed.cut(len(records))
    else:
        source, records = IN_MEMORY, _in_memory(spec)
        kept = range(len(records))
    rows = [_as_row(*records[number], source, number) for number in kept]
    faults = [row for row in rows if row.fault is not None]
    if faults and not skip_bad_rows:
        raise DataError(f"{faults[0].where}: {faults[0].fault}; {SKIPPABLE}")
    return rows


def _read(spec: DataSpec, data_root: str | None, seed: int, lenient: bool) -> list[Record]:
    if spec.kind == "file":
        return read_records(spec.name, lenient)
    if spec.kind in ("fictional", "fictional-small"):
        return [(row, None) for row in fictional_rows(spec.name, seed=seed, small=spec.kind == "fictional-small")]
    if spec.kind == "hub":
        records = load_from_hub(spec.name, spec.config, spec.split)
    else:
        records = read_benchmark(spec, data_root)
    if not records:
        raise DataError(f"{spec.base}: holds no rows")
    return records


def _in_memory(rows: Iterable[Any]) -> list[Record]:
    if isinstance(rows, Mapping):
        raise UsageError(f"a data set of several splits was given ({', '.join(map(str, rows))}); pass one of them")
    if not isinstance(rows, Iterable):
        raise UsageError(f"rows cannot be read from {type(rows).__name__}; pass a spec or a sequence of mappings")
    records = [(row, None) for row in rows]
    if not records:
        raise DataError("the data set given in memory holds no rows")
    return records


def _as_row(record: Any, line: int | None, source: str, number: int) -> Row:
    if isinstance(record, Row):
        return record
    if isinstance(record, DataError):
        return Row({}, source, number, line, str(record).partition(": ")[2])
    if not isinstance(record, Mapping):
        found = f"expected an object with fields such as question and answer, found {type(record).__name__}"
        return Row({}, source, number, line, found)
    return Row(dict(record), source, number, line)
