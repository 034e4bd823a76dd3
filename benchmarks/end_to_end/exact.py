"""What the scores are in float64, and how far from them others are."""

import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.end_to_end.published import sample_gradient, trainable
from fillm.data import SampleSet


def exact_scores(model: nn.Module, forget: SampleSet, retain: SampleSet, damping: float) -> dict[str, float]:
    """Equations (1) to (3) of docs/method.md from batch-1 autograd in float64.

    The retain gradients are computed twice, once for `q` and `d` and once for the weighted sum, so that memory stays
    at four copies of the parameters. What a model computes in float32 whatever its dtype (the mean square of
    transformers' RMSNorm, rotary angles) stays in float32: a relative error of 1e-6 or so.

    Returns:
        `|u|` of every tensor: 0 where neither set has a gradient, infinite where only the forget set has one.
    """
    wide = copy.deepcopy(model).double().eval()
    with trainable(wide) as parameters:
        v = [torch.zeros_like(p, requires_grad=False) for _, p in parameters]
        for sample in forget:
            for mean, gradient in zip(v, sample_gradient(wide, parameters, sample), strict=True):
                mean += gradient / len(forget)
        q, d = torch.zeros(len(v), len(retain)).double(), torch.zeros(len(v), len(retain)).double()
        for i, sample in enumerate(retain):
            for row, gradient in enumerate(sample_gradient(wide, parameters, sample)):
                q[row, i], d[row, i] = _dot(gradient, gradient), _dot(gradient, v[row])
        sizes = torch.tensor([p.numel() for _, p in parameters]).double()
        lambda_ = damping * q.mean(1) / sizes
        c = d / (lambda_[:, None] + q).clamp(min=torch.finfo(torch.float64).tiny)
        w = [torch.zeros_like(mean) for mean in v]
        for i, sample in enumerate(retain):
            for row, gradient in enumerate(sample_gradient(wide, parameters, sample)):
                w[row].add_(gradient, alpha=float(c[row, i]) / len(retain))
    scores = {}
    for row, (name, _) in enumerate(parameters):
        length = float((v[row] - w[row]).norm())
        scores[name] = length / float(lambda_[row]) if lambda_[row] > 0 else (math.inf if length > 0 else 0.0)
    return scores


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a.reshape(-1).dot(b.reshape(-1))


def largest_relative_error(scores: Mapping[str, float], exact: Mapping[str, float]) -> float:
    """`max |s - e| / e` over all tensors; a score of 0 or infinity has to be met exactly."""
    worst = 0.0
    for name, e in exact.items():
        s = scores[name]
        if s != e:
            worst = max(worst, abs(s - e) / e if 0.0 < e < math.inf else math.inf)
    return worst


def spearman(scores: Mapping[str, float], exact: Mapping[str, float]) -> float:
    """Rank correlation of two scorings of the same tensors, ties at their mean rank; NaN if one has no order."""
    a, b = (_ranks([values[name] for name in exact]) for values in (scores, exact))
    a, b = a - a.mean(), b - b.mean()
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length > 0 else math.nan


def _ranks(values: list[float]) -> np.ndarray:
    _, group, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[group]
