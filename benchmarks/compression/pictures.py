"""Accuracy against bytes, accuracy against time, and where second-order terms change a ranking at all, as PNG."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compression.measures import Row
from benchmarks.compression.study import INNER
from fillm.capture.sketching import KINDS

_DOTS_PER_INCH = 150
_PANEL = 3.3, 2.7  # inches
_COLOURS = dict(zip(KINDS, ("#4477aa", "#66ccee", "#228833", "#999933", "#ddcc77", "#ee6677", "#aa3377", "#bb5500"),
                    strict=True))  # fmt: skip
_WORKLOAD_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#999933", "#66ccee", "#bb5500")
_LEAST = 1e-9  # an error that a logarithmic axis can show
PANELS = (
    (INNER, "d_error_99", "$d_i$: 99 % quantile of the error, of $|g_i||v|$"),
    (INNER, "K_error_median", "$K$ off its diagonal, Frobenius, median tensor"),
    ("soir", "largest_error", "soir: largest relative score error"),
    ("woodbury", "largest_error", "woodbury: largest relative score error"),
    ("first-order", "largest_error", "first-order: largest relative score error"),
    ("damage", "median_error", "damage: median relative error"),
)
Draw = Callable[[Any], None]


def draw(rows: Sequence[Row], out: Path) -> None:
    """The three pictures of a study; Pareto pictures are of its first workload, all retain samples."""
    main = rows[0]["workload"]
    own = [row for row in rows if row["workload"] == main and row.get("n") == row["retain_samples"]]
    title = f"{main}: {rows[0]['forget_samples']} forget, {rows[0]['retain_samples']} retain samples"
    _pareto(own, "store_bytes", "bytes of the retain set's sketches", f"{title}; filled float32, hollow bfloat16",
            ("float32", "bfloat16"), out / "compression_bytes.png")  # fmt: skip
    times = {(row["kind"], row["k"]): row["over_plain"] for row in rows if row["method"] == "timing"}
    timed = [row | {"time": times.get((row["kind"], row["k"]), row.get("pass_over_plain"))} for row in own]
    _pareto(timed, "time", "time of the passes over plain forward + backward", title, ("float32",),
            out / "compression_time.png")  # fmt: skip
    _second_order(rows, out / "compression_second_order.png")


def _pareto(rows: Sequence[Row], x: str, label: str, title: str, storages: Sequence[str], path: Path) -> None:
    def fill(figure: Any) -> None:
        for axes, (method, name, text) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            here = [row for row in rows if row["method"] == method and row.get(name) is not None]
            for kind in KINDS:
                for storage in storages:
                    line = sorted(
                        (row["k"], row[x], max(row[name], _LEAST))
                        for row in here
                        if (row["kind"], row["storage"]) == (kind, storage)
                    )
                    _line(axes, [(bytes_, error) for _, bytes_, error in line], kind, storage)
            bare = [row[name] for row in here if row["kind"] == "none"]
            if bare:
                axes.axhline(bare[0], color="black", linewidth=0.8, linestyle="--")
                axes.text(0.99, bare[0], "|v|/λ alone", transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                          fontsize=6)  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(label, fontsize=7)
            _dress(axes, text)
        handles = [_handle(kind) for kind in KINDS if any(row["kind"] == kind for row in rows)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) or 1, fontsize=7, frameon=False)
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")

    _save(fill, (3 * _PANEL[0], 2 * _PANEL[1] + 0.6), path)


def _line(axes: Any, points: Sequence[tuple[float, float]], kind: str, storage: str) -> None:
    if points:
        whole = storage == "float32"
        axes.plot(*zip(*points, strict=True), color=_COLOURS[kind], linewidth=1.0 if whole else 0.6, marker="o",
                  markersize=3.5, linestyle="-" if whole else ":",
                  markerfacecolor=_COLOURS[kind] if whole else "white")  # fmt: skip


def _handle(kind: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=_COLOURS[kind], marker="o", markersize=3.5, linewidth=1.0, label=kind)


def _second_order(rows: Sequence[Row], path: Path) -> None:
    bare = [row for row in rows if row["kind"] == "none"]
    names = list(dict.fromkeys(row["workload"] for row in bare))
    methods = {"soir": ("--", "soir (datainf)"), "woodbury": ("-", "woodbury (the true inverse)")}

    def fill(figure: Any) -> None:
        from matplotlib.lines import Line2D

        panels = (
            (lambda row: 1.0 - row["spearman"], "1 − Spearman of |v|/λ and the score", 1e-4),
            (lambda row: row["largest_error"], "largest relative difference of |v|/λ and the score", 1e-4),
        )
        for axes, (value, text, least) in zip(figure.subplots(1, 2), panels, strict=True):
            top = least
            for number, name in enumerate(names):
                for method, (style, _) in methods.items():
                    points = [(r["n"], value(r)) for r in bare if (r["workload"], r["method"]) == (name, method)]
                    points = sorted(point for point in points if math.isfinite(point[1]))
                    if points:
                        top = max(top, *(y for _, y in points))
                        colour = _WORKLOAD_COLOURS[number % len(_WORKLOAD_COLOURS)]
                        axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o",
                                  markersize=3.5, linewidth=1.0)  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=least)
            axes.set_ylim(-0.1 * least, 2.0 * top)
            counts = sorted({row["n"] for row in bare})
            axes.set_xticks(counts, [str(n) for n in counts])
            axes.minorticks_off()
            axes.set_xlabel("retain samples", fontsize=7)
            _dress(axes, text)
        handles = [
            Line2D([], [], color=_WORKLOAD_COLOURS[i % len(_WORKLOAD_COLOURS)], marker="o", markersize=3.5, label=name)
            for i, name in enumerate(names)
        ]
        handles += [Line2D([], [], color="black", linestyle=style, label=label) for style, label in methods.values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
        figure.suptitle("Where second-order terms change a ranking", fontsize=10, x=0.01, ha="left")

    _save(fill, (2.2 * _PANEL[0], 1.2 * _PANEL[1] + 0.6), path)


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=8, loc="left")
    axes.tick_params(which="both", labelsize=7, length=2)
    axes.tick_params(which="minor", labelsize=5)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(fill: Draw, size: tuple[float, float], path: Path) -> None:
    """The same bytes for the same rows, whatever a person's own matplotlibrc says."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
