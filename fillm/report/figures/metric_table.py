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
    notes = [
        f"{run.name}, {str(name).replace('_', ' ')}: {reason}"
        for run in evaluated
        if isinstance(run.summary.get("notes"), dict)
        for name, reason in run.summary["notes"].items()
    ]
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
