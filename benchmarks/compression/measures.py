"""How far scores, rankings and inner products are from exact ones."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.compression.answers import Scored
from fillm.statistics import InnerProducts

TOP_PART = 0.1  # of the tensors
CLOSE = 0.005  # relative; tensors whose exact scores differ by no more may change places
REFERENCE = 1e-6  # relative; what the exact scores themselves are worth: products in float32
Row = dict[str, Any]


def score_measures(found: Scored, exact: Scored, sketched: np.ndarray, ascending: bool) -> Row:
    """Of rankings and scores.

    Args:
        found: [L, m]; correlations are means over the columns.
        exact: likewise.
        sketched: [L], whether a tensor's inner products were estimated; error bars are judged by these alone.
        ascending: whether small scores rank first.
    """
    pairs = list(zip(found.value.T, exact.value.T, strict=True))
    relative = relative_errors(found.value, exact.value)
    row = {
        "spearman": _mean([spearman(a, b) for a, b in pairs]),
        "kendall": _mean([kendall(a, b) for a, b in pairs]),
        "top_overlap": _mean([top_overlap(a, b, ascending) for a, b in pairs]),
        "pairs_out_of_order": sum(out_of_order(a, b) for a, b in pairs),
        "largest_error": float(np.abs(relative).max()),
        "median_error": float(np.median(np.abs(relative))),
        "median_signed_error": float(np.median(relative)),
    }
    return row | _bar_measures(found, exact, sketched)


def _bar_measures(found: Scored, exact: Scored, sketched: np.ndarray) -> Row:
    low, high, value, truth = (x[sketched] for x in (found.low, found.high, found.value, exact.value))
    known = np.isfinite(truth) & (truth != 0) if len(truth) else np.zeros(0, dtype=bool)
    if not known.any():
        return {}
    low, high, value, truth = low[known], high[known], value[known], truth[known]
    slack = REFERENCE * np.abs(truth)
    bar, error = (high - low) / 2.0 / np.abs(truth), np.abs(value - truth) / np.abs(truth)
    return {
        "coverage": float(((low - slack <= truth) & (truth <= high + slack)).mean()),
        "median_bar": float(np.median(bar)),
        "bar_over_error": float(np.median(bar) / max(np.median(error), REFERENCE)),
        "sketched_largest_error": float(error.max()),
        "sketched_median_error": float(np.median(error)),
    }


def relative_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """`(found - exact) / |exact|`; a score of 0 or infinity has to be met exactly, and is infinitely far off if not."""
    usual = np.isfinite(exact) & (exact != 0)
    safe = np.where(usual, exact, 1.0)
    with np.errstate(invalid="ignore"):
        return np.where(found == exact, 0.0, np.where(usual, (found - safe) / np.abs(safe), math.inf))


def spearman(found: np.ndarray, exact: np.ndarray) -> float:
    """Correlation of ranks, ties at their mean rank; NaN if one has no order."""
    a, b = (_ranks(values) for values in (found, exact))
    a, b = a - a.mean(), b - b.mean()
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length > 0 else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[group]


def kendall(found: np.ndarray, exact: np.ndarray) -> float:
    """Kendall's tau-b: pairs in the same order less pairs in the other, over the pairs that are no ties."""
    a, b = (np.sign(_ranks(values)[:, None] - _ranks(values)[None]) for values in (found, exact))
    length = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / length if length > 0 else math.nan


def top_overlap(found: np.ndarray, exact: np.ndarray, ascending: bool) -> float:
    """Part of the true best tenth of the tensors that is in the tenth found."""
    count = max(1, round(TOP_PART * len(exact)))
    sign = 1.0 if ascending else -1.0
    best = [set(np.argsort(sign * values, kind="stable")[:count].tolist()) for values in (found, exact)]
    return len(best[0] & best[1]) / count


def out_of_order(found: np.ndarray, exact: np.ndarray) -> int:
    """Pairs in the wrong order, of those whose exact scores differ by more than `CLOSE`."""
    finite = np.isfinite(exact) & np.isfinite(found)
    found, exact = found[finite], exact[finite]
    larger = exact[:, None] - exact[None] > CLOSE * np.maximum(np.abs(exact[:, None]), np.abs(exact[None]))
    return int((larger & (found[:, None] <= found[None])).sum())


def cross_errors(found: InnerProducts, exact: InnerProducts, size: int) -> Row:
    """Errors of one tensor's inner products: of `d`, a number a sample and right-hand side, and of `K`.

    `d` in units of `|g_i| |v|`, flat; `K` off the diagonal, its Frobenius norm in units of that of `sqrt(q_i q_j)`.
    """
    unit = (exact.q[:, None] * exact.squares).sqrt()
    reached = unit > 0
    d = ((found.cross - exact.cross).abs()[reached] / unit[reached]).numpy()
    n = exact.q.numel()
    every = torch.arange(n)
    apart = _apart(found.gram.part(every) - exact.gram.part(every))
    pairs = _apart((exact.q[:, None] * exact.q).sqrt())
    k = float(apart.norm() / pairs.norm()) if n > 1 and bool(pairs.any()) else 0.0
    return {"d": d, "K": k, "within": d <= 3.0 / math.sqrt(size)}


def _apart(matrix: Tensor) -> Tensor:
    return matrix - torch.diag(matrix.diagonal())


def cross_measures(tensors: Sequence[Row], along: Sequence[tuple[float, float]]) -> Row:
    """Over the tensors that were sketched: `cross_errors` of each, and its `S` as found and exact."""
    d = np.concatenate([one["d"] for one in tensors]) if tensors else np.zeros(0)
    if not d.size:
        return {}
    s = np.array([abs(a - b) / b for a, b in along if b > 0])
    return {
        "d_error_median": float(np.median(d)),
        "d_error_99": float(np.quantile(d, 0.99)),
        "d_within": float(np.concatenate([one["within"] for one in tensors]).mean()),
        "S_error_median": float(np.median(s)) if s.size else math.nan,
        "S_error_largest": float(s.max()) if s.size else math.nan,
        "K_error_median": float(np.median([one["K"] for one in tensors])),
        "K_error_largest": float(max(one["K"] for one in tensors)),
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
