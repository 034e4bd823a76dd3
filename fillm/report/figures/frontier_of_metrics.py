"""A metric of forgetting against a metric of keeping, of evaluations."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fillm.errors import RunFolderError
from fillm.evaluate.reference import compared_with_itself
from fillm.report.figures.data import Axis, Panel, Series
from fillm.report.figures.frontier_of_runs import unlearning_labels
from fillm.report.figures.repeats import centre_and_ends, repeats
from fillm.report.runs import Run, load_run

_UTILITY = Axis("Model Utility"), "model_utility"
_QUALITY = Axis("Forget Quality (p-value)", scale="log"), "forget_quality"
# What is forgotten is less probable: the axis is turned, so that forgotten is to the right.
_PROBABILITY = Axis("probability of the forget set's answers", reverse=True), "forget_probability"
ITSELF = "compared with itself"  # as a legend says it, of a hollow marker
_UNLEARNED, _RETAINED = "unlearn_success_", "retention_success_"


def metric_panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel for every pair of metrics that some evaluation has: TOFU's, with Forget Quality or without it the
    probability, and every score of KnowUnDo. A model that was compared with itself has a hollow marker, and its name
    says so.
    """
    evaluated = [run for run in runs if run.command == "evaluate"]
    quality = any(_number(run, _QUALITY[1]) is not None for run in evaluated)
    scores = dict.fromkeys(
        name.removeprefix(_UNLEARNED) for run in evaluated for name in run.summary if name.startswith(_UNLEARNED)
    )
    pairs = [(*(_QUALITY if quality else _PROBABILITY), *_UTILITY)]
    for score in scores:
        words = score.replace("_", " ")
        forgotten, kept = (Axis(f"{what} success, {words}") for what in ("unlearn", "retention"))
        pairs.append((forgotten, _UNLEARNED + score, kept, _RETAINED + score))
    panels = []
    for forget, of_forget, keep, of_keep in pairs:
        having = [run for run in evaluated if _number(run, of_forget) is not None and _number(run, of_keep) is not None]
        if not having:
            continue
        if forget.scale == "log" and any(run.summary[of_forget] <= 0.0 for run in having):
            forget = replace(forget, scale="linear")
        series = tuple(_series(having, of_forget, of_keep, forget.scale == "log"))
        panels.append(Panel(f"{keep.label} against {forget.label}", forget, keep, series))
    return panels


def _number(run: Run, name: str) -> float | None:
    value = run.summary.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _series(runs: Sequence[Run], of_forget: str, of_keep: str, logarithmic: bool) -> list[Series]:
    """A point for every group of evaluations whose models are repeats of one another, and for every other model."""
    made = {run.name: _unlearning(run) for run in runs}
    groups = repeats([replace(found, name=name) for name, found in made.items() if found is not None])
    labels = unlearning_labels([group[0] for group in groups]) if groups else []
    named = [(label, [run.name for run in group]) for label, group in zip(labels, groups, strict=True)]
    named += [(name, [name]) for name, found in made.items() if found is None]
    by_name = {run.name: run for run in runs}
    series = []
    for style, (label, names) in enumerate(named):
        values = [[float(by_name[name].summary[metric]) for name in names] for metric in (of_forget, of_keep)]
        ends = {}
        centres = []
        for axis, some in zip("xy", values, strict=True):
            centre, low, high = centre_and_ends(some, logarithmic=logarithmic and axis == "x")
            centres.append(np.array([centre]))
            if len(names) > 1:
                ends |= {f"{axis}_low": np.array([low]), f"{axis}_high": np.array([high])}
        name = f"{label}, {len(names)} runs" if len(names) > 1 else label
        itself = [
            one
            for one in names
            if any(compared_with_itself(by_name[one].summary, metric) for metric in (of_forget, of_keep))
        ]
        if itself:
            name += f" ({'' if len(itself) == len(names) else f'{len(itself)} of them '}{ITSELF})"
        series.append(Series(name, *centres, style, **ends, hollow=bool(itself), labels=(", ".join(names),)))
    return series


def _unlearning(run: Run) -> Run | None:
    """The unlearning that made the evaluated model, where its folder can still be read."""
    model = run.settings.get("model")
    if not isinstance(model, str) or (folder := run.place_of(model)).name != "model" or not folder.is_dir():
        return None
    try:
        found = load_run(folder.parent)
    except RunFolderError:
        return None
    return found if found.command == "unlearn" else None
