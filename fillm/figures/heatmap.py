"""Where in a model the scores lie: layers across, tensors down, the score as a colour on a logarithmic scale."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fillm.errors import UsageError
from fillm.models import KINDS

_ZERO, _INFINITE, _ABSENT = "#d9d9d9", "#d81b60", "#ffffff"  # none of them on the colour map, viridis
_DOTS_PER_INCH = 150


def score_heatmap(
    names: Sequence[str],
    kinds: Sequence[str],
    layers: Sequence[int],
    scores: Sequence[float],
    path: str | os.PathLike[str],
    title: str = "Scores by layer and tensor",
    label: str = "score",
) -> None:
    """Draws one cell per tensor and saves it as a PNG, the same bytes for the same arguments.

    A tensor's row is its name with the layer number removed; tensors outside the layers stand in the column `-`. Where
    several tensors share a cell (experts kept one by one, rows of one tensor), the largest score is shown.

    Args:
        names: tensor names.
        kinds: their kinds, of `fillm.models.KINDS`; rows are grouped by it.
        layers: their layers, -1 for none.
        scores: at least 0 for a logarithmic scale; with a negative one among them the scale is symmetric-logarithmic.
            Infinite scores and zeros have colours of their own.
        path: the file to write.
        title: above the picture.
        label: what the colour means, with its unit.

    Raises:
        UsageError: if there is nothing to draw, or the arguments differ in length.
    """
    if not names or len({len(names), len(kinds), len(layers), len(scores)}) > 1:
        raise UsageError("a heatmap needs names, kinds, layers and scores of one length, at least one of each")
    rows, columns, grid = layer_grid(names, kinds, layers, scores)

    import matplotlib

    settings = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))}
    with matplotlib.rc_context(settings):  # a person's own matplotlibrc changes nothing
        figure = _draw(rows, columns, grid, title, label)
        figure.savefig(os.fspath(path), format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def row_labels(names: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Names with the layer number removed: `model.layers.3.mlp.up_proj.weight` -> `mlp.up_proj.weight`.

    Numbers below the layer (single experts) become `*`. A tensor without a layer keeps its last two components, or its
    whole name where these would not tell it from another; so do two stacks of layers with equal tensors.
    """
    heads, shorts = [], []
    for name, layer in zip(names, layers, strict=True):
        parts = name.split(".")
        if layer >= 0 and str(layer) in parts[:-1]:
            cut = parts.index(str(layer))
            heads.append(".".join(parts[:cut]))
            shorts.append(".".join("*" if part.isdecimal() else part for part in parts[cut + 1 :]))
        else:
            heads.append(".".join(parts[:-2]))
            shorts.append(".".join(parts[-2:]))
    owners: dict[str, set[tuple[str, bool]]] = {}
    for head, short, layer in zip(heads, shorts, layers, strict=True):
        owners.setdefault(short, set()).add((head, layer >= 0))
    return [
        short if len(owners[short]) == 1 else f"{head}{'.*' if layer >= 0 else ''}.{short}".lstrip(".")
        for head, short, layer in zip(heads, shorts, layers, strict=True)
    ]


def layer_grid(
    names: Sequence[str], kinds: Sequence[str], layers: Sequence[int], scores: Sequence[float]
) -> tuple[list[tuple[str, str]], list[int], np.ndarray]:
    """The cells of a heatmap; of several scores in one cell the largest.

    Args:
        names: tensor names, at least one.
        kinds: their kinds.
        layers: their layers, -1 for none.
        scores: their scores.

    Returns:
        Rows, (kind, label) by kind and then by label; columns, layers with -1 first if there is one; scores, float64
        [rows, columns], NaN where there is no tensor.
    """
    order = {kind: i for i, kind in enumerate(KINDS)}
    keys = list(zip(kinds, row_labels(names, layers), strict=True))
    # Rankings come in the order of their scores; the rows' order must not depend on it.
    rows = sorted(set(keys), key=lambda key: (order.get(key[0], len(order)), key))
    columns = ([-1] if min(layers) < 0 else []) + list(range(max(layers) + 1))
    grid = np.full((len(rows), len(columns)), np.nan)
    row_of, column_of = {key: i for i, key in enumerate(rows)}, {layer: i for i, layer in enumerate(columns)}
    for key, layer, score in zip(keys, layers, scores, strict=True):
        cell = row_of[key], column_of[layer]
        grid[cell] = score if math.isnan(grid[cell]) else max(grid[cell], score)
    return rows, columns, grid


def _norm(finite: np.ndarray) -> tuple[Any, str]:
    """The scale of the finite scores other than zero, and what to call it."""
    from matplotlib.colors import LogNorm, SymLogNorm

    if finite.size == 0:
        return LogNorm(1.0, 10.0), "log scale"
    low, high = float(finite.min()), float(finite.max())
    if low < 0.0:
        reach = max(-low, abs(high))
        return SymLogNorm(float(np.abs(finite).min()), vmin=-reach, vmax=reach, base=10), "symmetric log scale"
    if high / low < 1.01:  # all the same: a colour bar needs some width
        return LogNorm(low / 2.0, high * 2.0), "log scale"
    return LogNorm(low, high), "log scale"


def _draw(rows: list[tuple[str, str]], columns: list[int], grid: np.ndarray, title: str, label: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cell = min(0.6, max(0.16, 9.0 / len(columns)))  # inches
    left = 0.058 * max(len(text) for _, text in rows) + 0.95
    plot = max(cell * len(columns), 3.4), max(0.24 * len(rows), 1.2)
    size = left + plot[0] + 1.15, plot[1] + 1.1
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / size[0], 0.7 / size[1], plot[0] / size[0], plot[1] / size[1]))
    bar_axes = figure.add_axes(((left + plot[0] + 0.15) / size[0], 0.7 / size[1], 0.16 / size[0], plot[1] / size[1]))

    special = np.where(np.isinf(grid), 1.0, np.where(grid == 0.0, 0.0, np.nan))
    scored = np.where(np.isfinite(grid) & (grid != 0.0), grid, np.nan)
    norm, scale = _norm(scored[np.isfinite(scored)])
    drawn = {"cmap": "viridis", "norm": norm, "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(np.ma.masked_invalid(scored), **drawn)
    axes.imshow(np.ma.masked_invalid(special), cmap=ListedColormap([_ZERO, _INFINITE]), vmin=0, vmax=1, aspect="auto",
                interpolation="nearest")  # fmt: skip
    bar = figure.colorbar(image, cax=bar_axes)
    bar.set_label(f"{label}, {scale}", fontsize=8)
    bar.ax.tick_params(labelsize=7)

    _label_axes(axes, rows, columns)
    axes.set_title(title, fontsize=10, loc="left")
    entries = [("zero", _ZERO, bool((special == 0.0).any())), ("infinite", _INFINITE, bool((special == 1.0).any()))]
    entries.append(("no such tensor", _ABSENT, bool(np.isnan(grid).any())))
    handles = [Patch(facecolor=colour, edgecolor="#808080", label=text) for text, colour, shown in entries if shown]
    if handles:
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(left / size[0], 0.0), ncols=3, fontsize=7,
                      frameon=False, borderaxespad=0.2, handlelength=1.2)  # fmt: skip
    return figure


def _label_axes(axes: Any, rows: list[tuple[str, str]], columns: list[int]) -> None:
    from matplotlib.transforms import blended_transform_factory

    first = int(columns[0] < 0)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**9) if len(columns) / step <= 34)
    shown = [i for i, layer in enumerate(columns) if layer < 0 or (layer % step == 0)]
    axes.set_xticks(shown, ["–" if columns[i] < 0 else str(columns[i]) for i in shown], fontsize=7)
    axes.set_yticks(range(len(rows)), [text for _, text in rows], fontsize=7)
    axes.set_xlabel("layer", fontsize=8)
    axes.tick_params(length=2)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    for i in range(1, len(rows)):
        if rows[i][0] != rows[i - 1][0]:
            axes.axhline(i - 0.5, color="black", linewidth=0.8)
    if first and len(columns) > 1:
        axes.axvline(first - 0.5, color="black", linewidth=0.8)
    starts = [i for i in range(len(rows)) if i == 0 or rows[i][0] != rows[i - 1][0]]
    across = blended_transform_factory(axes.figure.transFigure, axes.transData)
    for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        middle = (begin + end - 1) / 2
        axes.text(0.01, middle, rows[begin][0], transform=across, fontsize=8, fontweight="bold", va="center")
