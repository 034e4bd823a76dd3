"""What an evaluation came to: figures, reasons for those that are missing, and a table of rows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fillm.evaluate.metric import Outcome
from fillm.runs import write_record

SUMMARY, ROWS = "summary.json", "rows.parquet"


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation came to.

    Attributes:
        summary: figure by name; None where it could not be computed.
        notes: by the same names: why not, or what to know about a figure.
        rows: a row for every evaluated row: `set`, `row` (from 0, in its set), `id`, and the columns of the metrics,
            null where a metric does not look at the set.
    """

    summary: dict[str, float | None]
    notes: dict[str, str]
    rows: pyarrow.Table

    def lines(self) -> list[str]:
        """A table for a person, the reasons below it."""
        width = max(map(len, self.summary), default=0)
        lines = [f"{name:<{width}}  {_shown(value):>10}" for name, value in self.summary.items()]
        return [*lines, *(f"{name}: {note}" for name, note in self.notes.items())]


def merged(outcomes: Sequence[Outcome], ids: Mapping[str, Sequence[str]]) -> EvaluateResult:
    """The outcomes of all metrics as one result.

    Args:
        outcomes: in the order of their figures.
        ids: by row set, what its rows are called; of those sets that metrics looked at.
    """
    summary: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    columns: dict[str, dict[str, Sequence[Any]]] = {name: {} for name in ids}
    for outcome in outcomes:
        summary |= {name: _plain(value) for name, value in outcome.summary.items()}
        notes |= outcome.notes
        for name, found in outcome.columns.items():
            columns[name] |= found
    for name in [name for name, value in summary.items() if value is None and name not in notes]:
        raise AssertionError(f"{name} is None without a note")  # a fault of the metric, not of its user
    return EvaluateResult(summary, notes, _table(columns, ids))


def noted(result: EvaluateResult, names: Sequence[str], note: str) -> EvaluateResult:
    """The result with a note on those of the named figures that it has and that could be computed."""
    about = [name for name in names if result.summary.get(name) is not None]
    return replace(result, notes={**result.notes, **dict.fromkeys(about, note)})


def write_result(result: EvaluateResult, folder: Path, record: Mapping[str, Any]) -> None:
    """The files of a finished folder.

    Args:
        result: what the run came to.
        folder: empty; `run.yaml` is written last.
        record: what `run.yaml` holds.

    Raises:
        OSError: if the disk refuses.
    """
    pyarrow.parquet.write_table(result.rows, folder / ROWS, write_page_checksum=True)
    text = json.dumps({**result.summary, "notes": result.notes}, indent=1, allow_nan=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
    write_record(folder, record)


def _table(columns: Mapping[str, Mapping[str, Sequence[Any]]], ids: Mapping[str, Sequence[str]]) -> pyarrow.Table:
    names = list(dict.fromkeys(name for one in columns.values() for name in one))
    cells: dict[str, list[Any]] = {"set": [], "row": [], "id": [], **{name: [] for name in names}}
    for row_set, found in columns.items():
        count = len(ids[row_set])
        cells["set"] += [row_set] * count
        cells["row"] += range(count)
        cells["id"] += ids[row_set]
        for name in names:
            values = list(found.get(name, [None] * count))
            if len(values) != count:
                raise AssertionError(f"column {name} of {row_set} has {len(values)} values for {count} rows")
            cells[name] += values
    return pyarrow.table(cells)


def _plain(value: float | None) -> float | None:
    """A Python number; what is not finite has no place in JSON, and no metric returns it."""
    if value is None:
        return None
    if not math.isfinite(value):
        raise AssertionError(f"{value} is no figure")
    return float(value)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e-3 and value else f"{value:.4f}"
