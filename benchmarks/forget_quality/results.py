"""The table of methods, from the runs of all pairs of models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.forget_quality.scoring import COMPARED, FIGURES
from benchmarks.forget_quality.study import NO_LOSS
from benchmarks.unlearning.study import Record

COLUMNS = (
    "seed", "choice", "loss", "selected_parameters", "steps", "lr", "eta", "target_forget_loss", "forget_loss",
    *FIGURES, *COMPARED, "cpu", "commit", "command",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A column of the table; `logarithmic` is one whose mean over models is that of its logarithm."""

    title: str
    column: str
    logarithmic: bool = False

    def cell(self, values: Sequence[float]) -> str:
        """Mean over models, least to most in brackets."""
        if self.logarithmic:
            mean = math.exp(float(np.mean(np.log(values)))) if min(values) > 0.0 else 0.0
            shown = [f"{value:.1g}" for value in (mean, min(values), max(values))]
        else:
            shown = [f"{value:.2f}" for value in (float(np.mean(values)), min(values), max(values))]
        return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]}–{shown[2]})"


TABLE = (
    Figure("forget loss", "forget_loss"),
    Figure("forget P", "forget_probability"),
    Figure("forget ROUGE-L", "forget_rouge_l_recall"),
    Figure("forget truth ratio", "forget_truth_ratio"),
    Figure("retain P", "retain_probability"),
    Figure("retain ROUGE-L", "retain_rouge_l_recall"),
    Figure("retain truth ratio", "retain_truth_ratio"),
    Figure("utility", "model_utility"),
    Figure("Forget Quality", "forget_quality", logarithmic=True),
    Figure("D", "forget_quality_ks_statistic"),
)


def table(records: Sequence[Record]) -> str:
    """A Markdown table: a row a loss and mask in the order in which they come, the models themselves first."""
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["loss"] != NO_LOSS):
        cells.setdefault((record["loss"], record["choice"]), []).append(record)
    losses = list(dict.fromkeys(loss for loss, _ in cells))
    lines = [["loss", "mask", *(figure.title for figure in TABLE)]]
    for loss, choice in sorted(cells, key=lambda key: losses.index(key[0])):
        found = cells[loss, choice]
        name = "random" if choice.startswith("random ") else choice
        figures = [figure.cell([record[figure.column] for record in found]) for figure in TABLE]
        lines.append(["" if loss == NO_LOSS else f"`{loss}`", name, *figures])
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
