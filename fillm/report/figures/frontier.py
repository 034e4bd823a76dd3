"""What forgetting cost: the forget set against what was to be kept, with error bars over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fillm.report.figures.data import FigureData, Panel, abreast
from fillm.report.figures.frontier_of_metrics import metric_panels
from fillm.report.figures.frontier_of_quality import quality_panels
from fillm.report.figures.frontier_of_runs import loss_panels
from fillm.report.figures.frontier_of_study import study_panels
from fillm.report.figures.repeats import BARS
from fillm.report.figures.study_names import STUDENT
from fillm.report.runs import Run

_HOLLOW = "A hollow marker is a model that was compared with itself, which says nothing of forgetting."
_STUDENT = f"{STUDENT} On a logarithmic axis mean and interval are those of the logarithms."
# Where panels come from, what they show, what their bars are.
_SOURCES: tuple[tuple[Callable[[Sequence[Run]], list[Panel]], str, str], ...] = (
    (
        loss_panels,
        "Losses: a line runs from the model before unlearning over the measured steps to the weights that were kept; "
        "further right is more forgotten, lower is more kept.",
        BARS,
    ),
    (metric_panels, "Metrics: further right is more forgotten, higher is more kept.", BARS),
    (
        study_panels,
        "At equal forgetting: the retain loss at a lower and at a higher forget loss, at the best of the rates tried; "
        "further left is better; random masks of one size are counted together, those of one model as their mean. The "
        "dashed line is the whole model's at the higher. A mask without a point never got there.",
        _STUDENT,
    ),
    (
        quality_panels,
        "Beside the model that never saw the forget set, at one forget loss or as near as a method came: further right "
        "is harder to tell from that model, higher is more kept.",
        _STUDENT,
    ),
)


def frontier(runs: Sequence[Run]) -> FigureData | None:
    """Panels for the losses of unlearnings, the metrics of evaluations, and the two studies; None without any.

    Runs that differ in nothing but seed and model are repeats: their mean is drawn, with bars of one sample standard
    deviation (n - 1). Studies have bars of 95 % over their models.
    """
    panels: list[Panel] = []
    captions: list[str] = []
    bars: dict[str, None] = {}
    widest = 1
    for source, words, of_bars in _SOURCES:
        found = source(runs)
        if found:
            panels += [replace(found[0], new_row=True), *found[1:]]
            captions.append(words)
            widest = max(widest, _longest_row(found))
        if source is metric_panels and any(series.hollow for panel in found for series in panel.series):
            captions.append(_HOLLOW)
        if any(series.x_low is not None for panel in found for series in panel.series):
            bars[of_bars] = None
    if not panels:
        return None
    caption = " ".join([*captions, *bars])
    return FigureData("frontier", "Forgetting against keeping", caption, tuple(panels), columns=abreast(panels, widest))


def _longest_row(panels: Sequence[Panel]) -> int:
    """Panels side by side, if there is room for all that begin no line of their own."""
    firsts = [i for i, panel in enumerate(panels) if panel.new_row or i == 0]
    return max(end - start for start, end in zip(firsts, [*firsts[1:], len(panels)], strict=True))
