"""How evenly layers forget, and how evenly they keep: the spread of both losses over layers after equal steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiment import forgetting
from benchmarks.experiment.case import Case
from benchmarks.experiment.figure import dots, panels, save
from benchmarks.experiment.results import Record
from benchmarks.experiment.studies.layer_robustness import masks
from benchmarks.unlearning.study import losses_after
from fillm.report.figures.intervals import Interval, interval

KEY = ("layer", "loss", "steps")
COLUMNS = ("layer", "loss", "rate", "steps", "forget_start", "retain_start", "forget_end", "retain_end")
DEFAULTS: Mapping[str, Any] = {
    "losses": ["ga", "grad-diff"], "batch_size": 20, "eval_retain": 80, "rate": 1e-3, "steps": [4, 8, 16]
}  # fmt: skip
RISES = ("forget", "retain")


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """Both losses before and after so many steps of one run in a layer by itself; its rate falls to the end."""
    there = {tuple(row[name] for name in KEY) for row in done}
    layers = {name: mask for name, mask in masks(case).items() if name.startswith("layer ")}
    wanted = settings["steps"]
    every = math.gcd(*wanted)
    given = {**forgetting.DEFAULTS, **{name: settings[name] for name in ("batch_size", "eval_retain")}}
    config = forgetting.settings_of({**given, "max_steps": max(wanted), "eval_every": every}, False)
    for name, mask in layers.items():
        for loss in settings["losses"]:
            left = [steps for steps in wanted if (name, loss, steps) not in there]
            # No level ends it early: what equal steps do is the question.
            losses = losses_after(config, case, mask, loss, settings["rate"]) if left else {}
            for steps in left:
                yield {
                    "family": case.family, "seed": case.seed, "layer": name, "loss": loss, "rate": settings["rate"],
                    "steps": steps, "forget_start": losses[0][0], "retain_start": losses[0][1],
                    "forget_end": losses[steps][0], "retain_end": losses[steps][1],
                }  # fmt: skip


def spreads(records: Sequence[Record], loss: str, steps: int) -> dict[str, Interval]:
    """By `forget` and `retain`: standard deviation over layers of the rise, over its mean, averaged over models.

    Models in which the loss fell on average have no such ratio and are left out; `ranges` has them.
    """
    found = {}
    for one in RISES:
        rises = _rises(records, one, loss, steps)
        found[one] = interval([float(r.std(ddof=1) / r.mean()) for r in rises if len(r) > 1 and r.mean() > 0])
    return found


def difference(records: Sequence[Record], loss: str, steps: int) -> Interval:
    """The retain loss's spread less the forget loss's in the same model, averaged over models that have both."""
    pairs = zip(*(_rises(records, one, loss, steps) for one in RISES), strict=True)
    both = [
        [r.std(ddof=1) / r.mean() for r in pair] for pair in pairs if all(len(r) > 1 and r.mean() > 0 for r in pair)
    ]
    return interval([float(retain - forget) for forget, retain in both])


def ranges(records: Sequence[Record], loss: str, steps: int) -> dict[str, Interval]:
    """By `forget` and `retain`: the greatest rise over layers less the least, nats a token, averaged over models."""
    return {one: interval([float(np.ptp(r)) for r in _rises(records, one, loss, steps)]) for one in RISES}


def _rises(records: Sequence[Record], one: str, loss: str, steps: int) -> list[np.ndarray]:
    """Of every model, the rises of its layers."""
    of_models: dict[tuple[Any, Any], list[float]] = {}
    for row in records:
        if (row["loss"], row["steps"]) == (loss, steps):
            of_models.setdefault((row["family"], row["seed"]), []).append(row[f"{one}_end"] - row[f"{one}_start"])
    return [np.array(rises) for rises in of_models.values()]


def _cells(records: Sequence[Record]) -> list[tuple[str, int]]:
    return sorted({(row["loss"], row["steps"]) for row in records})


def summary(records: Sequence[Record]) -> str:
    """A row a loss and number of steps: spread over the mean, and range; the models that the first is of."""
    lines = ["the rise of a loss over layers: standard deviation over mean, and range in nats a token", ""]
    lines += [
        "| loss | steps | forget: spread | retain: spread | of models | difference | forget: range | retain: range |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for loss, steps in _cells(records):
        found, wide = spreads(records, loss, steps), ranges(records, loss, steps)
        models = f"{found['forget'].count} and {found['retain'].count}"
        between = difference(records, loss, steps)
        cells = [found["forget"], found["retain"], models, between, wide["forget"], wide["retain"]]
        lines.append(f"| {loss} | {steps} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path) -> None:
    """A row a loss and number of steps, a dot for each of the two losses."""
    # Of fewer than three models, those where the loss rose, the interval would hide all others.
    rows = {
        f"{loss}, {steps} steps": [
            (f"{one} loss", found if found.count > 2 else interval([]))
            for one, found in spreads(records, loss, steps).items()
        ]
        for loss, steps in _cells(records)
    }
    figure, [axes] = panels(["spread over layers"], 5.0, 1.2 + 0.3 * len(rows))
    dots(axes, rows, "standard deviation over mean of the rise (ratio)", log=False)
    axes.invert_yaxis()
    save(figure, path)
