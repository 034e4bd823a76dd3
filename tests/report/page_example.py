"""Runs and figures with everything a page has to show, and names that would break out of it if it let them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fillm.report.figures.data import Axis, Column, FigureData, Level, Matrix, Panel, Series, Table
from fillm.report.runs import Run

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">"
# What each of these is in one language, it must not be in the page: HTML, attributes, JSON, plotly's texts, templates.
HOSTILE_NAMES = (HOSTILE, "\"'`><b>bold</b>", "<!--<script>", "{{ 7 * 7 }}${1}%{x}", "a\u2028b&amp;<br>", "]]></style>")
_PARTS = ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
          "self_attn.o_proj", "input_layernorm")  # fmt: skip
LAYERS = 12


def example_runs() -> list[Run]:
    """Two rankings, an unlearning, an evaluation and a result file."""
    versions = {"fillm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    common = {"fingerprints": {"model": "ab12"}, "device": "cpu", "versions": versions}
    runs = []
    for i, method in enumerate(("soir", "gradient")):
        record = {
            "ranking": {"method": method, "objective": "forget", "granularity": "tensor"},
            "settings": {"model": "models/tiny-llama", "forget": "fictional:forget05", "retain": "fictional:retain95",
                         "method": method, "seed": i},
            **common,
            "seconds": 12.5 + 100 * i,
        }  # fmt: skip
        tables = {"ranking": ranking_table(i), "samples": pa.table({"set": ["forget"], "sample": ["0"], "loss": [1.5]})}
        runs.append(Run(Path(f"/runs/{method}"), method, "rank", record, tables, record["ranking"]))
    summary = {"forget_loss": {"before": 0.08, "after": 3.21}, "retain_loss": {"before": 0.09, "after": 0.25},
               "outside_mask_bit_equal": True}  # fmt: skip
    log = pa.table({"step": [1, 2], "forget_loss": [0.5, None], "seconds": [1.25, 2.5]})
    settings: dict[str, Any] = {"model": "models/tiny-llama", "forget": HOSTILE, "loss": "npo", "seed": 0}
    runs.append(Run(Path("/runs/npo"), "npo", "unlearn", {"settings": settings, **common}, {"log": log}, summary))
    scores = {"model_utility": 0.612345, "forget_quality": 3.2e-7, "notes": {"privacy_leakage": HOSTILE}}
    rows = pa.table({"row": [0, 1], "rouge": [0.25, float("nan")], "answer": ["plain", HOSTILE]})
    runs.append(Run(Path("/runs/eval"), "eval", "evaluate", {"settings": settings, **common}, {"rows": rows}, scores))
    return runs


def ranking_table(seed: int, layers: int = LAYERS) -> pa.Table:
    """A ranking with hostile tensor names, zeros, an infinite score, and a column without any value."""
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(layers) for part in _PARTS]
    names += list(HOSTILE_NAMES)
    scores = 10.0 ** np.random.default_rng(seed).normal(-4.0, 1.5, len(names))
    scores[3], scores[4] = np.inf, 0.0
    order = np.argsort(-scores, kind="stable")
    kinds = ["mlp" if "mlp" in name else "attn" if "attn" in name else "norm" for name in names]
    count = len(names)
    return pa.table(
        {
            "rank": pa.array(range(1, count + 1), pa.int32()),
            "name": [names[i] for i in order],
            "kind": [kinds[i] for i in order],
            "layer": pa.array([int(i) // len(_PARTS) if i < layers * len(_PARTS) else -1 for i in order], pa.int32()),
            "numel": pa.array([1_000 + 7 * int(i) for i in order], pa.int64()),
            "score": scores[order],
            "score_low": scores[order] * 0.9,
            "note": [""] * count,
            "nothing": pa.array([None] * count, pa.float64()),
        }
    )


def example_figures() -> list[FigureData]:
    """Every kind of panel: matrices on three scales, series with bars on three, categories, levels, a table."""
    return [_table(), _frontier(), _heatmap(), _agreement(), _shift(), _curves()]


def _table() -> FigureData:
    columns = (Column("run", numeric=False), Column("model utility"), Column("forget quality", "p-value"))
    rows = ((HOSTILE, 0.61234, 3.2e-7), ("npo", 0.5, None), ("whole model", -0.25, 0.9))
    return FigureData("metrics", "Metrics", "A dash: not computed.", table=Table(columns, rows, (f"npo: {HOSTILE}",)))


def _frontier() -> FigureData:
    rng = np.random.default_rng(0)
    names = ("soir, top 10 %", "soir, bottom 10 %", "random", "whole model", HOSTILE)
    series = []
    for style, name in enumerate(names):
        x, y = np.sort(rng.uniform(0.5, 4.0, 5)), np.sort(rng.uniform(0.1, 1.5, 5))
        bars = {"x_low": x - 0.1, "x_high": x + 0.15, "y_low": y - 0.05, "y_high": y + 0.08}
        series.append(Series(name, x, y, style, **bars, line=True, dashed=style == 3, hollow=style == 2))
    levels = (Level(0.2, "retain loss before"), Level(3.0, "retain-only model", along="y"))
    panel = Panel("", Axis("loss on forget", "nats a token"), Axis("loss on retain", "nats a token"), tuple(series),
                  levels=levels)  # fmt: skip
    return FigureData("frontier", "Forget against retain", "Right and low is better. Bars: ends of 5 seeds.", (panel,))


def _heatmap() -> FigureData:
    rng = np.random.default_rng(1)
    groups = tuple("norm" if "norm" in part else part.split("_")[0].split(".")[0] for part in (*_PARTS, "head"))
    panels = []
    for name, scale in (("soir", "log"), (f"trade-off {HOSTILE}", "symlog")):
        values = 10.0 ** rng.normal(-4.0, 1.5, (len(_PARTS) + 1, LAYERS + 1))
        values[:-1, 0], values[-1, 1:], values[2, 3], values[4, 5] = np.nan, np.nan, 0.0, np.inf
        if scale == "symlog":
            values *= np.where(rng.uniform(size=values.shape) < 0.4, -1.0, 1.0)
        across = Axis("layer", scale="category", categories=("–", *(str(i) for i in range(LAYERS))))
        down = Axis("tensor", scale="category", categories=(*(f"{p}.weight" for p in _PARTS), HOSTILE), reverse=True)
        colour = Axis("score", "weight per nat", scale)
        panels.append(Panel(name, across, down, matrix=Matrix(values, colour, groups=groups)))
    caption = "A cell is a tensor, a column a layer. Grey: zero."
    return FigureData("heatmap", "Scores by layer and tensor", caption, tuple(panels), columns=2)


def _agreement() -> FigureData:
    names = ("soir", "first-order", "gradient", "parameter-shift")
    values = np.array([[1, 0.93, 0.41, -0.22], [0.93, 1, 0.5, 0.0], [0.41, 0.5, 1, np.nan], [-0.22, 0.0, np.nan, 1]])
    x, y = (Axis("ranking", scale="category", categories=names, reverse=reverse) for reverse in (False, True))
    matrix = Matrix(values, Axis("Spearman's rank correlation"), low=-1.0, high=1.0, numbers=True)
    return FigureData("agreement", "Agreement of rankings", "1 is the same order.", (Panel("", x, y, matrix=matrix),))


def _shift() -> FigureData:
    layers = Axis("layer", scale="category", categories=tuple(str(i) for i in range(LAYERS)))
    x = np.arange(LAYERS, dtype=np.float64)
    series = tuple(
        Series(kind, x, (i + 1) * 1e-3 * np.sqrt(x + 1), i, line=True) for i, kind in enumerate(("mlp", "attn"))
    )
    panel = Panel("", layers, Axis("relative shift |Δθ| / |θ|"), series)
    return FigureData("shift", "How far parameters moved", "By layer and kind.", (panel,))


def _curves() -> FigureData:
    panels = []
    for method in ("soir", "woodbury"):
        series = []
        for style in range(8):
            k = 2.0 ** np.arange(8, 15)
            y = (style + 1) * 0.1 / np.sqrt(k)
            labels = tuple(f"{int(n):,} numbers a gradient" for n in k)
            series.append(
                Series(f"sketch {style}", k * 4e3, y, style, y_low=y * 0.5, y_high=y * 2, line=True, labels=labels)
            )
        x, y = Axis("sketches of the retain set", "bytes", "log"), Axis("median relative error of a score", "", "log")
        panels.append(Panel(f"{method}: error against bytes", x, y, tuple(series), levels=(Level(0.01, "no sketch"),)))
    return FigureData("curves", "Accuracy of compressed rankings", "Lower left is better.", tuple(panels), columns=2)
