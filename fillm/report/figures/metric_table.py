"""The metrics of every evaluation, a row a run."""

from collections.abc import Sequence

from fillm.report.figures.data import Cell, Column, FigureData, Table
from fillm.report.runs import Run


def metric_table(runs: Sequence[Run]) -> FigureData | None:
    """Every number of every `summary.json`, and why some are missing; None without an evaluation."""
    evaluated = [run for run in runs if run.command == "evaluate"]
    if not evaluated:
        return None
    names = list(
        dict.fromkeys(name for run in evaluated for name, value in run.summary.items() if _is_metric(name, value))
    )
    rows = tuple((run.name, *(_value(run, name) for name in names)) for run in evaluated)
    columns = (Column("run", numeric=False), *(Column(name.replace("_", " ")) for name in names))
    notes = _notes(evaluated)
    caption = (
        "What docs/evaluate.md defines, with the range of every metric; numbers without a unit. A dash: not computed"
        + (", for the reason given below the table." if notes else ".")
    )
    return FigureData("metric_table", "Metrics", caption, table=Table(columns, rows, tuple(notes)))


def _is_metric(name: str, value: object) -> bool:
    return name != "notes" and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))


def _value(run: Run, name: str) -> Cell:
    value = run.summary.get(name)
    return value if _is_metric(name, value) else None


def _notes(runs: Sequence[Run]) -> list[str]:
    """What is said of metrics, each thing once, with the metrics and the runs that it is said of unless it is all."""
    said: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        notes = run.summary.get("notes")
        for name, reason in notes.items() if isinstance(notes, dict) else ():
            said.setdefault((str(reason), str(name).replace("_", " ")), []).append(run.name)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, name), names in said.items():
        merged.setdefault((reason, tuple(names)), []).append(name)
    return [
        f"{', '.join(metrics)}{'' if len(names) == len(runs) else ' of ' + ', '.join(names)}: {reason}"
        for (reason, names), metrics in merged.items()
    ]
