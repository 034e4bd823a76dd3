"""Tables as the page shows them: text a person reads, and beside it the exact value that is sorted by and copied."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

_DIGITS = 4  # significant digits shown; the exact value is kept beside them
_FIXED = (1e-3, 1e6)  # a column whose magnitudes all lie between these is written without an exponent
_LONG = 40  # characters of a text that may be broken into lines
_NAME = 20  # of one that may be broken anywhere on paper, as a path or a tensor is
_SHOWN_COLUMNS = 8  # of a table that is not known here
# What is looked at first; the other columns come at the press of a button, and with every copy.
_FIRST = {
    "ranking": ("rank", "name", "kind", "layer", "numel", "score", "note"),
    "samples": ("set", "sample", "tokens", "loss"),
}
MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its header, and its name in what is copied.
        numeric: aligned and sorted as numbers.
        further: left out at first.
    """

    name: str
    numeric: bool
    further: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: shown.
        value: sorted by and copied, where the text does not say it exactly; None where it does.
    """

    text: str
    value: str | None = None


@dataclass(frozen=True)
class PageTable:
    """A table ready for the template.

    Attributes:
        title: above it.
        columns: in order.
        rows: cells in the order of the columns.
        total: rows there are, of which `rows` may be the first ones.
        source: the file that holds them all, empty if there is none.
        about: what has to be known of them, a sentence or more above the rows, or empty.
    """

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    total: int
    source: str = ""
    about: str = ""

    def first(self, most: int) -> "PageTable":
        """The same table with its first rows alone."""
        return self if len(self.rows) <= most else replace(self, rows=self.rows[:most])

    def turned(self, most: int) -> "list[PageTable]":
        """The same table on its side, as paper has room for it: a row a column, after `most` columns a table anew.

        Args:
            most: rows of this table that stand side by side; its first column gives their headers.
        """
        parts = [self.rows[i : i + most] for i in range(0, len(self.rows), most)]
        return [
            PageTable(
                self.title,
                [replace(self.columns[0], further=False), *(Column(row[0].text, numeric=True) for row in part)],
                [[Cell(column.name), *(row[i] for row in part)] for i, column in enumerate(self.columns) if i],
                len(self.columns) - 1,
            )
            for part in parts
        ]

    @property
    def looks(self) -> list[str]:
        """CSS classes of every column's cells."""
        return [
            " ".join([_look(column, [row[i].text for row in self.rows]), *(["further"] if column.further else [])])
            for i, column in enumerate(self.columns)
        ]

    @property
    def further(self) -> int:
        """Columns that are left out at first."""
        return sum(column.further for column in self.columns)


def page_table(table: pa.Table, title: str, most: int, kind: str = "", source: str = "") -> PageTable:
    """The first rows of an Arrow table; columns without a single value are left out.

    Args:
        table: of any columns; what is nested is shown as its text.
        title: above the table.
        most: rows that are taken at most.
        kind: `ranking` or `samples` where it is one of these; the columns shown first depend on it.
        source: name of the file that holds the whole table.
    """
    names = [name for name in table.column_names if table[name].null_count < len(table) or not len(table)]
    wanted = [name for name in _FIRST.get(kind, ()) if name in names] or names[:_SHOWN_COLUMNS]
    if kind == "ranking" and "note" in names and not any(table["note"].to_pylist()):
        wanted = [name for name in wanted if name != "note"]
    ordered = [*wanted, *(name for name in names if name not in wanted)]
    head = table.slice(0, most)
    columns = [Column(name, _is_number(table.schema.field(name).type), name not in wanted) for name in ordered]
    cells = [column_cells(head[column.name].to_pylist(), column.numeric) for column in columns]
    return PageTable(title, columns, [list(row) for row in zip(*cells, strict=True)], len(table), source)


def matrix_table(title: str, corner: str, across: Sequence[str], down: Sequence[str], values: np.ndarray) -> PageTable:
    """A matrix with the names of its rows in the first column.

    Args:
        title: above the table.
        corner: header of the first column.
        across: names of the columns, [C].
        down: names of the rows, [R].
        values: [R, C], float64; NaN is a missing cell.
    """
    columns = [Column(corner, numeric=False), *(Column(str(name), numeric=True) for name in across)]
    flat = column_cells([float(v) for v in np.asarray(values, np.float64).ravel()], numeric=True)
    rows = [[Cell(str(name)), *flat[i * len(across) : (i + 1) * len(across)]] for i, name in enumerate(down)]
    return PageTable(title, columns, rows, len(rows))


def column_cells(values: Sequence[Any], numeric: bool) -> list[Cell]:
    """Cells of one column, its numbers in one format so that they stand under each other.

    Args:
        values: of one kind; None is missing, and so is NaN.
        numeric: whether they are numbers.
    """
    if not numeric:
        return [Cell("" if v is None else _text(v)) for v in values]
    if all(v is None or isinstance(v, int) for v in values):
        return [Cell(MISSING, "") if v is None else _cell(f"{v:,}", str(int(v))) for v in values]
    decimals = _decimals(values)
    return [_number(v, decimals) for v in values]


def _decimals(values: Sequence[Any]) -> int | None:
    """Digits after the point for a column of floats; None for scientific notation."""
    sizes = [abs(float(v)) for v in values if v is not None and math.isfinite(v) and v != 0]
    if not sizes:
        return 1
    low, high = min(sizes), max(sizes)
    if low < _FIXED[0] or high >= _FIXED[1]:
        return None
    if all(float(size).is_integer() for size in sizes):
        return 0
    return max(0, _DIGITS - 1 - math.floor(math.log10(low)))


def _number(value: Any, decimals: int | None) -> Cell:
    if value is None or math.isnan(value):
        return Cell(MISSING, "")
    exact = repr(float(value))
    if math.isinf(value):
        return Cell("∞" if value > 0 else "−∞", exact)
    if decimals is None:
        return _cell("0" if value == 0 else f"{value:.{_DIGITS - 1}e}", exact)
    return _cell(f"{value:,.{decimals}f}", exact)


def _cell(text: str, exact: str) -> Cell:
    """What is shown has a true minus sign; what is copied has none."""
    shown = text.replace("-", "−") if text.startswith("-") else text
    return Cell(shown, None if shown == exact else exact)


def _look(column: Column, texts: Sequence[str]) -> str:
    if column.numeric:
        return "number"
    longest = max(map(len, texts), default=0)
    return "word" if longest > _LONG else "text name" if longest > _NAME else "text"


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
