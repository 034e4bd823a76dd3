"""Studies of masks: the rows of each, one a model, mask and loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fillm.report.figures.damage import FEW_STEPS, LEVELS, Row, merged, model_of
from fillm.report.result_files import rows_of
from fillm.report.runs import Run


@dataclass(frozen=True)
class MaskStudy:
    """What one file holds.

    Attributes:
        run: the file.
        rows: one a model, mask and loss, at the best of the rates tried; the retain loss at a level is None where none
            got there.
    """

    run: Run
    rows: list[Row]

    @property
    def title(self) -> str:
        """The experiment's, or the file's name."""
        return self.run.study.get("title", self.run.name)

    @property
    def losses(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(row["loss"] for row in self.rows))

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the masks in the order of the file, draws of one size as one."""
        return tuple(dict.fromkeys(merged(row["choice"]) for row in self.rows))


def mask_studies(runs: Sequence[Run]) -> list[MaskStudy]:
    """Every study of masks among some runs, in their order."""
    return [MaskStudy(run, best_rates(rows)) for run, rows in rows_of(runs, "rates", "masks")]


def best_rates(rows: Sequence[Row]) -> list[Row]:
    """One row a model, mask and loss: the least retain loss at each level over the rates tried, None if none got there.

    Rows of a study that keeps the best alone have no `lr` and come as they are.
    """
    tried: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        tried.setdefault((model_of(row), row["choice"], row["loss"]), []).append(row)
    return [some[0] if "lr" not in some[0] else _best(some) for some in tried.values()]


def _best(rows: Sequence[Row]) -> Row:
    lowest = min(row["lr"] for row in rows)
    fine = [row for row in rows if row["steps"] >= FEW_STEPS or row["lr"] == lowest]
    found = {}
    for _, column in LEVELS:
        least = min((row[column] for row in fine if row[column] is not None), default=math.nan)
        found[column] = None if math.isnan(least) else least
    return {**rows[0], **found}
