"""What a person reads at the terminal."""

import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.compression.measures import Row
from benchmarks.compression.study import INNER, PUBLISHED

HEAD = (
    "kind", "k", "d 99 %", "d ok", "K", "soir", "covered", "woodbury", "covered", "bar/err", "first-order",
    "per-sample", "damage", "Spearman w.", "MB", "x plain",
)  # fmt: skip
LEGEND = """Largest relative error of a score over all tensors; soir-per-sample over all forget samples too.
Of the tensors that are sketched: d 99 %, the error of <g_i, v> in |g_i||v| that 99 of 100 samples stay below;
d ok, the part of them within 3/sqrt(k); K, the error of <g_i, g_j> of different samples (Frobenius, median tensor);
covered, the part whose exact score lies within its error bar; bar/err, the median bar over the median error.
x plain: both passes over plain forward + backward, the median of the rounds where they were timed, else of one run.
MB: the retain set's sketches and squared norms."""
TABLE_SIZES = (256, 4096, 65536)


def tables(rows: Sequence[Row], sizes: Iterable[int] = TABLE_SIZES) -> str:
    """A table for every workload, of all its retain samples and float32; errors are the largest over tensors."""
    texts = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        own = [row for row in rows if row["workload"] == workload]
        n = max(row["n"] for row in own if row.get("n"))
        here = [row for row in own if row.get("n") == n and row.get("storage") == "float32"]
        times = {(r["kind"], r["k"]): r["over_plain"] for r in own if r["method"] == "timing"}
        kinds = dict.fromkeys(row["kind"] for row in here)
        present = sorted({row["k"] for row in here if row["k"]})
        shown = [size for size in sizes if size in present] or present
        lines = [list(HEAD)]
        for kind in kinds:
            for size in [None] if kind == "exact" else [0] if kind == "none" else shown:
                line = _line(kind, size, [r for r in here if (r["kind"], r["k"]) == (kind, size)], times)
                lines += [line] if line else []
        first = own[0]
        title = (
            f"{workload}: {first['model_parameters'] / 1e6:.2f}M parameters, {first['model_tensors']} tensors, "
            f"{first['forget_samples']} forget and {n} retain samples"
        )
        texts.append(title + "\n" + _aligned(lines) + _published(here))
    return "\n\n".join([*texts, LEGEND])


def _line(kind: str, size: int | None, rows: list[Row], times: dict[tuple[str, int], float]) -> list[str]:
    by_method = {row["method"]: row for row in rows}
    if not by_method:
        return []

    def cell(method: str, name: str, form: Callable[[float], str]) -> str:
        value = by_method.get(method, {}).get(name)
        return "-" if value is None or math.isnan(value) else form(value)

    once = next((row["pass_over_plain"] for row in rows if row.get("pass_over_plain") is not None), None)
    time = times.get((kind, size), once) if size else None
    return [
        {"none": "|v|/lambda alone"}.get(kind, kind),
        "" if size is None else str(size),
        cell(INNER, "d_error_99", _percent),
        cell(INNER, "d_within", _percent),
        cell(INNER, "K_error_median", _percent),
        cell("soir", "largest_error", _percent),
        cell("soir", "coverage", _percent),
        cell("woodbury", "largest_error", _percent),
        cell("woodbury", "coverage", _percent),
        cell("woodbury", "bar_over_error", "{:.1f}".format),
        cell("first-order", "largest_error", _percent),
        cell("soir-per-sample", "largest_error", _percent),
        cell("damage", "largest_error", _percent),
        cell("woodbury", "spearman", "{:.4f}".format),
        f"{rows[0]['store_bytes'] / 2**20:.1f}",
        "-" if time is None else f"{time:.2f}",
    ]


def _published(rows: Sequence[Row]) -> str:
    """The published way's fall: its rank correlation beside ours, from the same sketches."""
    found = [row for row in rows if row["method"] == PUBLISHED]
    ours = {(row["kind"], row["k"]): row for row in rows if row["method"] == "soir"}
    if not found:
        return ""
    ks = sorted({row["k"] for row in found})
    said = []
    for k in ks:
        here = [row for row in found if row["k"] == k]
        low, high = min(row["spearman"] for row in here), max(row["spearman"] for row in here)
        least = min(ours[row["kind"], k]["spearman"] for row in here)
        said.append(f"{k}: {low:.2f} to {high:.2f} ({least:.4f})")
    return "\nSpearman of soir the published way, with damping over k, least to most of the kinds (ours at least): " + (
        ", ".join(said)
    )


def _percent(value: float) -> str:
    value *= 100.0
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
