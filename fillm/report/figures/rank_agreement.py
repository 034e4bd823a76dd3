"""How far rankings of one model agree: Spearman's rank correlation of every two."""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from fillm.rank.config import RankConfig
from fillm.report.figures.data import Axis, FigureData, Matrix, Panel
from fillm.report.labels import labels_of
from fillm.report.runs import Run

_LEAST = 3  # things ranked by both; two agree or disagree by chance


def rank_agreement(runs: Sequence[Run]) -> FigureData | None:
    """One panel a model that was ranked at least twice at one granularity; None if there is none."""
    groups: dict[tuple[str | None, str], list[Run]] = {}
    for run in runs:
        if run.command == "rank":
            groups.setdefault((run.fingerprint(), str(run.summary["granularity"])), []).append(run)
    panels = [_panel(some, granularity) for (_, granularity), some in groups.items() if len(some) > 1]
    if not panels:
        return None
    caption = (
        "Spearman's rank correlation of the scores of what both rankings rank: 1 is the same order, 0 none, -1 the "
        "reverse. Equal scores share their mean rank. A dash stands where a ranking has no order (all scores equal) or "
        f"fewer than {_LEAST} entries are shared."
    )
    return FigureData("rank_agreement", "Agreement of rankings", caption, tuple(panels), columns=min(2, len(panels)))


def _panel(runs: Sequence[Run], granularity: str) -> Panel:
    labels = tuple(labels_of(runs, RankConfig, ("method",)))
    values = np.eye(len(runs))
    for i in range(len(runs)):
        for j in range(i + 1):
            values[i, j] = values[j, i] = spearman(*_shared(runs[i], runs[j]))
    model = str(runs[0].settings.get("model") or "the default model").rstrip("/").split("/")[-1]
    axis = {"scale": "category", "categories": labels}
    return Panel(
        title=f"{model}, by {granularity}",
        x=Axis("ranking", **axis),
        y=Axis("ranking", **axis, reverse=True),
        matrix=Matrix(values, Axis("Spearman's rank correlation"), low=-1.0, high=1.0, numbers=True),
    )


def _shared(one: Run, other: Run) -> tuple[np.ndarray, np.ndarray]:
    """The scores of what both rank, float64 [N] each, in one order."""
    tables = [run.tables["ranking"] for run in (one, other)]
    keys = ["name", *(["index"] if all("index" in table.column_names for table in tables) else [])]
    left, right = (
        table.select([*keys, "score"]).rename_columns([*keys, side])
        for table, side in zip(tables, ("left", "right"), strict=True)
    )
    joined: pa.Table = left.join(right, keys=keys, join_type="inner", use_threads=False)
    scores = np.stack([joined[side].to_numpy().astype(np.float64) for side in ("left", "right")])
    known = ~np.isnan(scores).any(axis=0)
    return scores[0][known], scores[1][known]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation with mean ranks for ties; NaN if one has no order, or of fewer than three values.

    Args:
        x: [N], infinite values allowed.
        y: the same.
    """
    if len(x) < _LEAST:
        return math.nan
    a, b = (_mean_ranks(values) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return min(1.0, max(-1.0, float(a @ b) / size)) if size > 0.0 else math.nan


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2.0)[place]
