"""One file a figure: from runs to the plain numbers that are drawn."""

from collections.abc import Callable, Sequence

from fillm.report.figures.compression_curves import compression_curves, compression_workloads
from fillm.report.figures.data import Axis, Cell, Column, FigureData, Level, Matrix, Panel, Series, Table, number
from fillm.report.figures.frontier import frontier
from fillm.report.figures.metric_table import metric_table
from fillm.report.figures.parameter_shift import parameter_shift
from fillm.report.figures.rank_agreement import rank_agreement
from fillm.report.figures.score_heatmap import score_heatmap
from fillm.report.figures.study_damage import study_damage
from fillm.report.figures.study_means import study_means
from fillm.report.figures.training_curves import training_curves
from fillm.report.runs import Run

__all__ = [
    "FIGURES", "STUDIES", "Axis", "Cell", "Column", "FigureData", "Level", "Matrix", "Panel", "Series", "Table",
    "figures_of", "number",
]  # fmt: skip

FIGURES: tuple[Callable[[Sequence[Run]], FigureData | None], ...] = (
    metric_table,
    frontier,
    score_heatmap,
    rank_agreement,
    parameter_shift,
    training_curves,
    compression_curves,
    compression_workloads,
)
STUDIES: tuple[Callable[[Sequence[Run]], list[FigureData]], ...] = (study_damage, study_means)  # some for every study


def figures_of(runs: Sequence[Run]) -> list[FigureData]:
    """Every figure that the runs have something for."""
    found = [data for figure in FIGURES if (data := figure(runs)) is not None]
    return found + [data for figures in STUDIES for data in figures(runs)]
