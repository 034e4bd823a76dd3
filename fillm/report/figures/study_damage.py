"""Studies of masks: the damage at equal forgetting over that of the whole model, drawn and as a table."""

from collections.abc import Sequence

import numpy as np

from fillm.report.figures.damage import LEVELS, WHOLE, against_whole, merged
from fillm.report.figures.data import Axis, Cell, Column, FigureData, Level, Panel, Series, Table, abreast
from fillm.report.figures.intervals import Interval
from fillm.report.figures.mask_studies import MaskStudy, mask_studies
from fillm.report.figures.study_names import claim_of, stems
from fillm.report.runs import Run

Found = dict[tuple[str, str, int], tuple[Interval, int]]  # loss, mask, which level -> damage, how often never
_MEANING = (
    "Damage: the rise of the retain loss until the forget loss has reached a level, at the best of the rates tried, "
    "over that of the whole model in the same model. Geometric mean over models, and its 95 % interval by Student's t; "
    "draws of one size are one value a model. Where some never got there, the mean is of the others and flatters the "
    "mask."
)
_COLUMNS = "Level: the forget loss; never: how often a mask did not reach it."
_READING = "Further left is better; the dashed line is the whole model."


def study_damage(runs: Sequence[Run]) -> list[FigureData]:
    """A figure and a table for every study of masks that has the whole model beside them."""
    figures = []
    studies = [study for study in mask_studies(runs) if WHOLE in study.choices]
    for study, stem in zip(studies, stems([study.run for study in studies]), strict=True):
        masks = [choice for choice in study.choices if choice != WHOLE]
        found = {
            (loss, mask, i): against_whole(study.rows, mask, loss, column)
            for loss in study.losses
            for mask in masks
            for i, (_, column) in enumerate(LEVELS)
        }
        if any(one.count for one, _ in found.values()):
            figures += _figures(study, stem, masks, found)
    return figures


def _figures(study: MaskStudy, stem: str, masks: Sequence[str], found: Found) -> list[FigureData]:
    panels = tuple(_panel(study, loss, masks, found) for loss in study.losses)
    claim = claim_of(study.run)
    told, left = (" ".join(filter(None, parts)) for parts in ((_MEANING, _COLUMNS, claim), (_MEANING, _READING, claim)))
    title = f"Damage at equal forgetting: {study.title}"
    return [
        FigureData(f"{stem}_damage", title, left, panels, columns=abreast(panels, len(panels))),
        FigureData(f"{stem}_damage_table", f"{title}, in numbers", told, table=_table(study, masks, found)),
    ]


def _level(study: MaskStudy, which: int) -> str:
    return f"{study.rows[0][LEVELS[which][0]]:g}"


def _panel(study: MaskStudy, loss: str, masks: Sequence[str], found: Found) -> Panel:
    place = np.arange(len(masks), dtype=np.float64)
    series = []
    for i in range(len(LEVELS)):
        own = [found[loss, mask, i] for mask in masks]
        mean, low, high = (np.array([getattr(one, end) for one, _ in own]) for end in ("mean", "low", "high"))
        labels = tuple(f"{mask}: {_models(study, loss, mask, *found[loss, mask, i])}" for mask in masks)
        series.append(Series(f"at a forget loss of {_level(study, i)}", mean, place, i, low, high, labels=labels))
    return Panel(
        title=loss,
        x=Axis("retain damage over that of the whole model", "ratio", "log"),
        y=Axis("mask", scale="category", categories=tuple(masks), reverse=True),
        series=tuple(series),
        levels=(Level(1.0, WHOLE, along="y"),),
    )


def _models(study: MaskStudy, loss: str, mask: str, damage: Interval, never: int) -> str:
    if not any(row["loss"] == loss and merged(row["choice"]) == mask for row in study.rows):
        return "not tried"
    return f"{damage.count} models{f', {never} never got there' if never else ''}"


def _table(study: MaskStudy, masks: Sequence[str], found: Found) -> Table:
    columns = (
        Column("mask", numeric=False), Column("loss, level", "nats a token", numeric=False),
        Column("damage", "ratio"), Column("95 % low"), Column("95 % high"),
        Column("models"), Column("never"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for (loss, mask, i), (damage, never) in found.items():
        if damage.count or never:
            ends = damage.mean, damage.low, damage.high
            rows.append((mask, f"{loss}, {_level(study, i)}", *ends, damage.count, never))
    return Table(columns, tuple(rows))
