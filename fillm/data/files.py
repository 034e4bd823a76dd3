"""Readers of .json, .jsonl, .csv and .parquet files. Nothing that could run code is ever unpickled."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fillm.documents import read_bytes
from fillm.errors import DataError
from fillm.paths import expanded

SKIPPABLE = "mend the row, or leave such rows out with --skip-bad-rows"
LONGEST_LINE = 1 << 26  # bytes of a line of JSON; a sample has thousands
LARGEST_WHOLE = 1 << 32  # bytes of a file that cannot be read in pieces
Record = tuple[Any, int | None]  # what stands at one row, and its line in the file (from 1) where there are lines


def read_records(path: str, lenient: bool = False) -> list[Record]:
    """All rows of a file, in order; the extension decides the reader, for .json the content does.

    Args:
        path: ends in .json (an array or JSON Lines), .jsonl, .csv or .parquet; `~` is the home folder.
        lenient: a line of JSON Lines that cannot be read becomes the `DataError` that says why, instead of raising it.

    Returns:
        (row, line) pairs. A row of a JSON file is whatever stands there; whether it is an object is checked later.

    Raises:
        DataError: if the file is missing, empty, unreadable, not UTF-8 or not what its extension says.
    """
    file = expanded(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown extension {file.suffix!r}; rows are read from {', '.join(_READERS)}")
    try:
        if file.is_dir():
            raise DataError(f"{path}: is a folder; name a file in it")
        if file.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; give one with at least one row")
        records = list(reader(file, path))
        faults = [row for row, _ in records if isinstance(row, DataError)]
        if faults and not lenient:
            raise DataError(f"{faults[0]}; {SKIPPABLE}")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read ({reason}); check the path and its rights") from None
    if not records:
        raise DataError(f"{path}: the file holds no rows; give one with at least one row")
    return records


def _decode(raw: bytes, path: str, first_line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw[: error.start].count(b"\n")
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None


def _parse_json(text: str, path: str, first_line: int, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        reason = f"{error.msg}, column {error.colno}"
    except (RecursionError, ValueError) as error:  # nested too deep; a number of more digits than Python converts
        line, reason = first_line, str(error)
    raise DataError(f"{path}, line {line}: bad JSON ({reason}); expected {expected}") from None


def _read_json_lines(file: Path, path: str) -> Iterator[Record]:
    with file.open("rb") as stream:  # in bytes and line by line, so that a bad byte is reported with its line
        for line, raw in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), start=1):
            if len(raw) > LONGEST_LINE:
                raise DataError(
                    f"{path}, line {line}: longer than {LONGEST_LINE >> 20} MiB; write one JSON object a line"
                )
            try:
                text = _decode(raw, path, line)
                if text.strip():
                    yield _parse_json(text.rstrip(), path, line, "one JSON object a line"), line
            except DataError as error:
                yield error, line


def _read_json(file: Path, path: str) -> Iterator[Record]:
    with file.open("rb") as stream:
        start = b""
        while not start and (chunk := stream.read(4096)):
            start = chunk.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_json_lines(file, path)
        return
    rows = _parse_json(_decode(_whole(file, path), path), path, 1, "an array of objects")
    yield from ((row, None) for row in rows)


def _whole(file: Path, path: str) -> bytes:
    """The bytes of a file whose format cannot be read in pieces."""
    try:
        return read_bytes(file, LARGEST_WHOLE)
    except ValueError as error:
        raise DataError(f"{path}: {error}, and has to be read as a whole; save it as .jsonl or .parquet") from None


def _read_csv(file: Path, path: str) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(_decode(_whole(file, path), path), newline=""), strict=True)
    try:
        for record in reader:
            line = reader.line_num - sum(value.count("\n") for value in record.values() if isinstance(value, str))
            if None in record:
                columns = len(reader.fieldnames or ())
                raise DataError(
                    f"{path}, line {line}: has {columns + len(record[None])} columns where the header has {columns}; "
                    "put quotes around a value with a comma"
                )
            yield {name: value for name, value in record.items() if value is not None}, line
    except csv.Error as error:
        line = reader.line_num + 1  # where the row begins: an open quote runs on to the end of the file
        raise DataError(f"{path}, line {line}: bad CSV ({error}); check quotes and commas") from None


def _read_parquet(file: Path, path: str) -> Iterator[Record]:
    import pyarrow  # heavy, and needed for this format alone
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file, page_checksum_verification=True).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter of values that Python lacks
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file ({reason}); write it anew") from None
    yield from ((row, None) for row in rows)


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
