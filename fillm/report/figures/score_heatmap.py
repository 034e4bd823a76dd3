"""Where in a model the scores lie: layers across, tensors down, by kind."""

from collections.abc import Sequence

import numpy as np

from fillm.figures import layer_grid
from fillm.rank.config import RankConfig
from fillm.rank.ranking_files import score_label
from fillm.report.figures.data import Axis, FigureData, Matrix, Panel
from fillm.report.labels import labels_of
from fillm.report.runs import Run

OUTSIDE = "–"  # the column of tensors that belong to no layer


def score_heatmap(runs: Sequence[Run]) -> FigureData | None:
    """One panel a ranking: the score of every tensor; None without a ranking.

    Rows and heads count by the largest of their tensor; single experts share a cell, which shows the largest.
    """
    ranked = [run for run in runs if run.command == "rank" and run.tables["ranking"].num_rows]
    if not ranked:
        return None
    panels = [_panel(run, label) for run, label in zip(ranked, labels_of(ranked, RankConfig, ("method",)), strict=True)]
    models = len({run.fingerprint() for run in ranked})
    caption = (
        f"{_count(len(ranked), 'ranking')} of {_count(models, 'model')}. A cell is a tensor, a column a layer; tensors "
        f"outside the layers stand in the column {OUTSIDE}. Colours are on a logarithmic scale of their own in every "
        "panel: scores of different methods have different units. Where rows, heads or experts were ranked, a cell "
        "shows the largest of them."
    )
    return FigureData(
        "score_heatmap", "Scores by layer and tensor", caption, tuple(panels), columns=min(2, len(panels))
    )


def _panel(run: Run, label: str) -> Panel:
    table = run.tables["ranking"]
    rows, columns, grid = layer_grid(*(table[name].to_pylist() for name in ("name", "kind", "layer", "score")))
    scored = grid[np.isfinite(grid)]
    colour = Axis(
        score_label(str(run.summary["method"]), str(run.summary["objective"])),
        scale="symlog" if (scored < 0).any() else "log",
    )
    return Panel(
        title=label,
        x=Axis("layer", scale="category", categories=tuple(OUTSIDE if c < 0 else str(c) for c in columns)),
        y=Axis("tensor", scale="category", categories=tuple(text for _, text in rows), reverse=True),
        matrix=Matrix(grid, colour, groups=tuple(kind for kind, _ in rows)),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
