"""The table of docs/compression.md, from the committed rows.

python -m benchmarks.compression.page [benchmarks/results/compression.csv]
"""

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.compression.study import INNER
from fillm.capture.sketching import DENSE

SIZE, DENSE_SIZE = 4096, 256
METHODS = ("soir", "woodbury", "soir-per-sample", "first-order")
_FILE = Path(__file__).resolve().parents[1] / "results" / "compression.csv"
Quoted = dict[str, str]  # a line of the CSV


def read(path: Path = _FILE) -> list[Quoted]:
    """The lines of a study's CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cost_table(rows: Sequence[Quoted]) -> str:
    """Of the first workload, a line for every kind: what it costs and how far scores are off, as Markdown."""
    own = [row for row in rows if row["workload"] == rows[0]["workload"]]
    lines = [("", "time over plain forward + backward", "MB", "`d_i` within `3/sqrt(k)`", *_code(METHODS))]
    for kind in ("none", *_kinds(own)):
        size = {"none": 0}.get(kind, _size(kind))
        lines.append(_line(kind, [row for row in own if (row["kind"], row["k"]) == (kind, str(size))]))
    return _markdown(lines)


def bar_table(rows: Sequence[Quoted]) -> str:
    """Over all workloads, for every kind and method: the part of sketched tensors inside their bars, least and most of
    a workload, and the median over workloads of the median bar over the median error.
    """
    lines = [("", *_code(METHODS))]
    for kind in _kinds(rows):
        cells = []
        for method in METHODS:
            of = [row for row in rows if (row["kind"], row["k"], row["method"]) == (kind, str(_size(kind)), method)]
            cells.append(_bars([row for row in of if row["coverage"]]))
        lines.append((_name(kind), *cells))
    return _markdown(lines)


def _bars(rows: Sequence[Quoted]) -> str:
    if not rows:
        return ""
    covered, sketched = ([float(row[name]) for row in rows] for name in ("coverage", "sketched_tensors"))
    pooled = sum(part * count for part, count in zip(covered, sketched, strict=True)) / sum(sketched)
    ratio = median(float(row["bar_over_error"]) for row in rows)
    return f"{pooled:.0%} ({min(covered):.0%} to {max(covered):.0%}), {ratio:.1f}".replace("%", " %")


def _kinds(rows: Sequence[Quoted]) -> list[str]:
    found = dict.fromkeys(row["kind"] for row in rows if row["k"] not in ("", "0") and row["method"] != "timing")
    return sorted(found, key=lambda kind: kind in DENSE)


def _size(kind: str) -> int:
    return DENSE_SIZE if kind in DENSE else SIZE


def _name(kind: str) -> str:
    return f"`{kind}` ({DENSE_SIZE})" if kind in DENSE else f"`{kind}`"


def _code(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"`{name}`" for name in names)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0], "|---" * len(lines[0]) + "|", *texts[1:]])


def _line(kind: str, rows: Sequence[Quoted]) -> tuple[str, ...]:
    of = {row["method"]: row for row in rows}
    megabytes = float(of["soir"]["store_bytes"]) / 1e6
    return (
        r"`\|v\|/lambda` alone (k = 0)" if kind == "none" else _name(kind),
        f"{float(of['timing']['over_plain']):.2f}" if "timing" in of else "",
        f"{megabytes:.1f}" if megabytes < 1 else f"{megabytes:.0f}",
        _percent(of[INNER]["d_within"], whole=True) if INNER in of else "",
        *(_cell(of.get(method)) for method in METHODS),
    )


def _cell(row: Quoted | None) -> str:
    if row is None or not row["largest_error"] or not math.isfinite(float(row["largest_error"])):
        return ""
    error = _percent(row["largest_error"])
    return f"{error} ({_percent(row['coverage'], whole=True)})" if row["coverage"] else error


def _percent(text: str, whole: bool = False) -> str:
    value = 100.0 * float(text)
    digits = 0 if whole or value >= 10 else 1 if value >= 0.95 else 2
    return f"{value:.{digits}f} %"


if __name__ == "__main__":
    found = read(*map(Path, sys.argv[1:]))
    print(cost_table(found), bar_table(found), sep="\n\n")
