"""How second-order the ranking is: `|v| / lambda`, DataInf's inverse, the true one and the diagonal one compared."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment.case import Case
from benchmarks.experiment.figure import lines, panels, save
from benchmarks.experiment.rankings import Rankings, counts, spearman, top_overlap
from benchmarks.experiment.results import Record, finite
from fillm.report.figures.intervals import Interval, interval

KEY = ("retain_samples", "scope", "one", "other")
COLUMNS = (*KEY, "parameters", "tensors", "spearman", "top_overlap", "median_ratio")
DEFAULTS: Mapping[str, Any] = {"retain_samples": [10, 20, 40], "scopes": ["mlp,attn", "mlp", "attn", "norm"]}
CURVATURES = ("datainf", "woodbury", "diagonal")
FIRST = "no curvature"  # |v| / lambda


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """A record a pair of curvatures, number of retain samples and kind of tensors."""
    there = {tuple(row[name] for name in KEY) for row in done}
    rankings = Rankings(case)
    for retain in counts(len(case.rows["retain"]), settings["retain_samples"]):
        for scope in settings["scopes"]:
            found = {one: rankings.of({"method": "soir", "curvature": one}, retain, scope) for one in CURVATURES}
            rows = found["datainf"].table.to_pylist()
            scores = {one: ranking.scores for one, ranking in found.items()}
            scores[FIRST] = {row["name"]: row["forget_norm"] / row["damping"] for row in rows}
            for one, other in _pairs():
                key = (retain, scope, one, other)
                if key in there or len(rows) < 3:
                    continue
                ratios = sorted(scores[one][name] / scores[other][name] for name in scores[one])
                yield {
                    "family": case.family, "seed": case.seed, **dict(zip(KEY, key, strict=True)),
                    "parameters": sum(row["numel"] for row in rows), "tensors": len(rows),
                    "spearman": spearman(scores[one], scores[other]),
                    "top_overlap": top_overlap(scores[one], scores[other]), "median_ratio": ratios[len(ratios) // 2],
                }  # fmt: skip


def _pairs() -> list[tuple[str, str]]:
    return [(FIRST, "datainf"), ("datainf", "woodbury"), (FIRST, "woodbury"), ("datainf", "diagonal")]


def over_models(records: Sequence[Record], scope: str, one: str, other: str, column: str) -> dict[float, Interval]:
    """Number of retain samples -> the mean of a column over models."""
    found: dict[float, list[float]] = {}
    for row in records:
        if (row["scope"], row["one"], row["other"]) == (scope, one, other):
            found.setdefault(row["retain_samples"], []).append(row[column])
    return {n: interval(finite(values)) for n, values in sorted(found.items())}


def summary(records: Sequence[Record]) -> str:
    """Spearman and the median ratio of scores, at all retain samples."""
    lines_ = ["all retain samples, mean over models (95 % interval)", ""]
    lines_ += ["| tensors | pair | Spearman | top tenth in common | median ratio of scores |", "|---|---|---|---|---|"]
    for scope in dict.fromkeys(row["scope"] for row in records):
        for one, other in _pairs():
            cells = [
                list(over_models(records, scope, one, other, column).values())[-1:]
                for column in ("spearman", "top_overlap", "median_ratio")
            ]
            if all(cells):
                lines_.append(f"| {scope} | {one}, {other} | " + " | ".join(str(cell[0]) for cell in cells) + " |")
    return "\n".join(lines_)


def draw(records: Sequence[Record], path: Path) -> None:
    """A panel a kind of tensors, a line a pair."""
    scopes = list(dict.fromkeys(row["scope"] for row in records))
    figure, axes = panels(scopes, 2.6 * len(scopes), 2.8, share_y=True)
    for one, scope in zip(axes, scopes, strict=True):
        series = {f"{a}, {b}": over_models(records, scope, a, b, "spearman") for a, b in _pairs()}
        lines(
            one,
            {name: points for name, points in series.items() if points},
            "retain samples",
            "",
            legend=one is axes[0],
        )
    axes[0].set_ylabel("Spearman's correlation of scores", fontsize=7)
    save(figure, path)
