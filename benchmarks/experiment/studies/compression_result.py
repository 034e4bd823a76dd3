"""What compression does to a ranking, and to what its mask keeps."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiment import forgetting
from benchmarks.experiment.case import Case
from benchmarks.experiment.figure import dots, panels, save
from benchmarks.experiment.forgetting import Choice
from benchmarks.experiment.rankings import Rankings, spearman, top_overlap
from benchmarks.experiment.results import Record, finite
from fillm.masks import Mask
from fillm.models import catalogue
from fillm.report.figures.damage import WHOLE, against_whole
from fillm.report.figures.intervals import interval

KEY = ("choice", "loss")
COLUMNS = (*forgetting.COLUMNS, "compression", "sketch_dim", "damping_dimension", "spearman", "top_overlap")
EXACT = "exact"
DEFAULTS: Mapping[str, Any] = {
    **forgetting.DEFAULTS, "kinds": ["countsketch", "factored-sjlt"], "sizes": [64, 512], "fraction": 0.1,
    "side": "top",
}  # fmt: skip


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """A record a compression and loss."""
    yield from forgetting.records(case, _choices(case, settings), settings, done)


def _choices(case: Case, settings: Mapping[str, Any]) -> Iterator[Choice]:
    about = {
        "compression": "none",
        "sketch_dim": 0,
        "damping_dimension": "parameter",
        "spearman": 1.0,
        "top_overlap": 1.0,
    }
    yield {"choice": WHOLE, **about}, partial(Mask.whole, case.model, [info.name for info in catalogue(case.model)])
    rankings = Rankings(case)
    exact = rankings.of({"method": "soir"})
    yield {"choice": EXACT, **about}, partial(exact.select, settings["fraction"], settings["side"])
    for kind in settings["kinds"]:
        for size in settings["sizes"]:
            for damping in ("parameter", "sketch"):
                given = {"method": "soir", "compression": kind, "sketch_dim": size, "damping_dimension": damping}
                ranking = rankings.of(given)
                published = " as published" if damping == "sketch" else ""
                about = {
                    "choice": f"{kind} {size}{published}", "compression": kind, "sketch_dim": size,
                    "damping_dimension": damping, "spearman": spearman(ranking.scores, exact.scores),
                    "top_overlap": top_overlap(ranking.scores, exact.scores),
                }  # fmt: skip
                yield about, partial(ranking.select, settings["fraction"], settings["side"])


def summary(records: Sequence[Record]) -> str:
    """Agreement with the exact ranking, and damage at equal forgetting."""
    lines = ["agreement with the exact ranking, mean over models (95 % interval)", ""]
    lines += ["| | Spearman | top tenth in common |", "|---|---|---|"]
    loss = records[0]["loss"]
    for choice in dict.fromkeys(row["choice"] for row in records):
        own = [row for row in records if (row["choice"], row["loss"]) == (choice, loss)]
        cells = [interval(finite([row[column] for row in own])) for column in ("spearman", "top_overlap")]
        lines.append(f"| {choice} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, "", forgetting.table(records, "masks of compressed rankings")])


def draw(records: Sequence[Record], path: Path) -> None:
    """Agreement on the left, damage on the right."""
    losses = list(dict.fromkeys(row["loss"] for row in records))
    choices = [name for name in dict.fromkeys(row["choice"] for row in records) if name != WHOLE]
    figure, axes = panels(["the ranking", "what its mask keeps"], 8.0, 1.2 + 0.3 * len(choices), share_y=True)
    agreed = {
        choice: [
            (
                "soir",
                interval(finite([r["spearman"] for r in records if (r["choice"], r["loss"]) == (choice, losses[0])])),
            )
        ]
        for choice in choices
    }
    dots(axes[0], agreed, "Spearman with the exact ranking", log=False)
    rows = {choice: [(loss, against_whole(records, choice, loss)[0]) for loss in losses] for choice in choices}
    dots(axes[1], rows, "retain damage over that of the whole model (ratio)")
    axes[0].invert_yaxis()
    save(figure, path)
