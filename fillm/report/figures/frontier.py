"""What forgetting cost: the forget set against what was to be kept, with error bars over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fillm.report.figures.data import FigureData, Panel
from fillm.report.figures.frontier_of_metrics import metric_panels
from fillm.report.figures.frontier_of_quality import quality_panels
from fillm.report.figures.frontier_of_runs import loss_panels
from fillm.report.figures.frontier_of_study import study_panels
from fillm.report.figures.repeats import BARS
from fillm.report.runs import Run

_SOURCES: tuple[tuple[Callable[[Sequence[Run]], list[Panel]], str], ...] = (
    (
        loss_panels,
        "Losses: a line runs from the model before unlearning over the measured steps to the weights that were kept; "
        "further right is more forgotten, lower is more kept.",
    ),
    (metric_panels, "Metrics: further right is more forgotten, higher is more kept."),
    (
        study_panels,
        "At equal forgetting: the retain loss at a lower and at a higher forget loss, at the best of the rates tried; "
        "further left is better; random masks are counted together. The dashed line is the whole model's at the "
        "higher. A mask without a point never got there.",
    ),
    (
        quality_panels,
        "Beside the model that never saw the forget set, at one forget loss or as near as a method came: further right "
        "is harder to tell from that model, higher is more kept.",
    ),
)


def frontier(runs: Sequence[Run]) -> FigureData | None:
    """Panels for the losses of unlearnings, the metrics of evaluations, and the two studies; None without any.

    Runs that differ in nothing but seed and model are repeats: their mean is drawn, with bars of one sample standard
    deviation (n - 1).
    """
    panels: list[Panel] = []
    captions = []
    widest = 1
    for source, words in _SOURCES:
        found = source(runs)
        if found:
            panels += [replace(found[0], new_row=True), *found[1:]]
            captions.append(words)
            widest = max(widest, len(found))
    if not panels:
        return None
    if any(series.x_low is not None for panel in panels for series in panel.series):
        captions.append(BARS)
    caption = " ".join(captions)
    return FigureData("frontier", "Forgetting against keeping", caption, tuple(panels), columns=min(3, widest))
