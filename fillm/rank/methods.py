"""Every localisation method: from a model and two sets of samples to the rows of a ranking (docs/method.md)."""

import dataclasses
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fillm.errors import ModelError, UsageError
from fillm.models import TensorInfo
from fillm.models.sharded_tensors import whole
from fillm.rank.gram_methods import rank_by_gram
from fillm.rank.layer_groups import in_groups
from fillm.rank.path import rank_path
from fillm.rank.scoring import (
    Job,
    Scores,
    from_update,
    from_weights,
    influence_columns,
    keep,
    mean_columns,
    ranked_row,
    unit_rows,
)
from fillm.rank.soir import Influence, influence_of_nothing, mean_gradient, rank_soir, rounding_noise
from fillm.rank.units import groups_of, sizes
from fillm.statistics import accumulator_dtype, any_entry, inner, squared_norm, total


def rank(job: Job) -> Scores:
    """Runs the method that the settings name.

    Raises:
        UsageError: no tensor in scope has heads and heads are to be ranked.
    """
    if job.config.granularity == "head" and not groups_of(job.model, job.scope, "head"):
        raise UsageError(
            f"--granularity head: none of the {len(job.scope)} tensors in scope is split by attention head; "
            f"widen --include, or use --granularity row"
        )
    if job.config.sketched or job.config.exact_gram:
        return rank_by_gram(job)
    scores = in_groups(job, _METHODS[job.config.canonical_method])
    if late := rounding_noise(scores.sizes) - scores.noise:  # told by a group of layers that came after theirs
        names = [info.name for info in job.scope if info.name in late]
        part = dataclasses.replace(
            job, scope=[info for info in job.scope if info.name in late], capture=job.capture.like(names)
        )
        nothing = influence_of_nothing(part.capture.parameters, len(job.retain), job.config.damping)
        scores.replace(late, _from_influence(part, nothing))
    return scores


def _soir(job: Job) -> Scores:
    config = job.config
    if config.curvature == "diagonal":
        return _soir_diagonal(job)
    influence = rank_soir(
        job.passes,
        job.capture,
        job.forget,
        job.retain,
        damping=config.damping,
        tolerance=config.tolerance,
        need_update=config.needs_update,
        largest=job.largest,
    )
    return _from_influence(job, influence)


def _from_influence(job: Job, influence: Influence) -> Scores:
    if job.config.needs_update:
        return from_update(job, influence)
    rows = []
    for info in job.scope:
        low, high = influence.low[info.name], influence.high[info.name]
        middle = low if low == high else 0.5 * (low + high)
        rows.append(
            ranked_row(info, middle, **influence_columns(influence, info.name)) | {"score_low": low, "score_high": high}
        )
    return Scores.of(influence, rows, {})


def _soir_diagonal(job: Job) -> Scores:
    """`u = -v / (F + lambda)` with `F = (1/n) sum_i g_i^2` entry by entry."""
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    fisher = mean_gradient(job.passes, "retain", "retain pass", job.capture, job.retain, power=2)
    influence = Influence(forget_mean=v)
    for name, forget in v.items():
        square = total(fisher[name])  # mean_i |g_i|^2
        lambda_ = job.config.damping * square / forget.numel()
        u = forget.div(fisher[name] + lambda_).neg_() if lambda_ > 0 else torch.zeros_like(forget)
        influence.update[name] = u
        influence.lambda_[name], influence.mean_retain_sq_norm[name] = lambda_, square
        influence.forget_norm[name] = math.sqrt(squared_norm(forget))
        influence.gain[name] = -inner(forget, u)
        if lambda_ == 0.0:
            influence.notes[name] = "unused" if influence.forget_norm[name] == 0.0 else "no retain gradient"
    return from_update(job, influence)


def _soir_sum(job: Job) -> Scores:
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    r = mean_gradient(job.passes, "retain", "retain pass", job.capture, job.retain)
    influence, n, lambda_ = Influence(forget_mean=v), len(job.retain), job.config.damping
    for name, forget in v.items():
        square, dot = squared_norm(r[name]), inner(r[name], forget)
        # u = -(1 / (n lambda)) (v - r (r . v) / (lambda + |r|^2))
        u = forget.clone().add_(r[name], alpha=-dot / (lambda_ + square)).mul_(-1.0 / (n * lambda_))
        influence.update[name] = u
        influence.lambda_[name], influence.mean_retain_sq_norm[name] = lambda_, square
        influence.forget_norm[name] = math.sqrt(squared_norm(forget))
        influence.gain[name] = -inner(forget, u)
        if square == 0.0:
            influence.notes[name] = "unused" if influence.forget_norm[name] == 0.0 else "no retain gradient"
    return from_update(job, influence)


def _saliency(job: Job) -> Scores:
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    return from_weights(job, lambda name: v[name], mean_columns(v))


def _gradient(job: Job) -> Scores:
    magnitude = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget, power=1)

    def columns(name: str) -> dict[str, str]:
        return {"note": "" if any_entry(magnitude[name]) else "unused"}

    return from_weights(job, lambda name: magnitude[name], columns)


def _fisher_ratio(job: Job) -> Scores:
    """Forget over retain diagonal Fisher (arXiv 2308.07707): of a unit the ratio of the sums, of a weight its own."""
    forget = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget, power=2)
    retain = mean_gradient(job.passes, "retain", "retain pass", job.capture, job.retain, power=2)
    rows, saved = [], {}
    groups = groups_of(job.model, job.scope, job.config.granularity)
    for info in job.scope:
        group = groups.get(info.name)
        if job.config.granularity == "head" and group is None:
            continue
        pair = whole(forget[info.name]), whole(retain[info.name])
        if job.config.granularity != "tensor":
            ratios = _ratio(*pair)
            keep(job, saved, info.name, ratios)
        if job.config.granularity == "element":
            score = ratios[ratios.isfinite()].sum(dtype=torch.float64)[None]
        else:
            sums = [t.sum(dtype=torch.float64)[None] if group is None else group.sum_entries(t) for t in pair]
            score = _ratio(*sums)
        note = ""
        if not bool(pair[1].any()):
            note = "no retain gradient" if bool(pair[0].any()) else "unused"
        rows += unit_rows(info, group, score, None, None, {"note": note})
    return Scores(rows, saved)


def _ratio(forget: Tensor, retain: Tensor) -> Tensor:
    """Entry by entry; 0 where neither set has a gradient, infinite where only the forget set has one."""
    return torch.where(forget > 0, forget / retain, torch.zeros_like(forget))


def _wagle(job: Job) -> Scores:
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    r = mean_gradient(job.passes, "retain", "retain pass", job.capture, job.retain)
    theta = job.capture.parameters
    return from_weights(
        job,
        lambda name: (theta[name].detach().to(r[name].device) - r[name] / job.config.mu) * v[name],
        mean_columns(v, r),
    )


def _memflex(job: Job) -> Scores:
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    r = mean_gradient(job.passes, "retain", "retain pass", job.capture, job.retain)
    rows = []
    for info in job.scope:
        a, b = v[info.name], r[info.name]
        norms = math.sqrt(squared_norm(a)), math.sqrt(squared_norm(b))
        cosine = inner(a, b) / (norms[0] * norms[1]) if min(norms) > 0 else 0.0
        size = total(a.abs()) / a.numel()
        kept = cosine < job.config.similarity and size > job.config.magnitude
        note = (
            "unused" if norms[0] == 0.0 and norms[1] == 0.0 else f"cosine {cosine:.3f}" + ("" if kept else ", not kept")
        )
        rows.append(ranked_row(info, size, forget_norm=norms[0], note=note, tier=0 if kept else 1))
    return Scores(rows)


def _parameter_shift(job: Job) -> Scores:
    # With duplicates: a tied base has every name that an untied model has.
    base = dict(job.base_model.named_parameters(remove_duplicate=False)) if job.base_model is not None else {}
    for info in job.scope:
        if info.name not in base or tuple(base[info.name].shape) != tuple(info.shape):
            raise ModelError(
                f"--base-model: has no tensor {info.name} of shape {list(info.shape)}; it is another model"
            )
    theta = job.capture.parameters
    rows, saved = [], {}
    groups = groups_of(job.model, job.scope, job.config.granularity)
    for info in job.scope:
        group = groups.get(info.name)
        if job.config.granularity == "head" and group is None:
            continue
        now, before = whole(theta[info.name].detach()), whole(base[info.name].detach())
        dtype = accumulator_dtype(torch.promote_types(now.dtype, before.dtype))
        shift = now.to(dtype) - before.to(now.device, dtype)
        length, size = math.sqrt(squared_norm(shift)), math.sqrt(squared_norm(before))
        relative = length / size if size else float("inf") if length else 0.0
        element = job.config.granularity == "element"
        score = shift.abs().double().sum()[None] if element else sizes(shift, group, job.config.effective_score)
        rows += unit_rows(info, group, score, None, None, {"note": f"relative {relative:.3e}"})
        if job.config.granularity != "tensor":
            keep(job, saved, info.name, shift)
    return Scores(rows, saved)


def _random(job: Job) -> Scores:
    def draw(info: TensorInfo) -> float:
        digest = hashlib.sha256(f"{job.config.seed}:{info.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return Scores([ranked_row(info, draw(info)) for info in job.scope])


def _none(job: Job) -> Scores:
    return Scores([ranked_row(info, float(len(job.scope) - i)) for i, info in enumerate(job.scope)])


_METHODS: dict[str, Callable[[Job], Scores]] = {
    "soir": _soir,
    "soir-sum": _soir_sum,
    "gradient": _gradient,
    "fisher-ratio": _fisher_ratio,
    "memflex": _memflex,
    "parameter-shift": _parameter_shift,
    "wagle": _wagle,
    "saliency": _saliency,
    "path": rank_path,
    "random": _random,
    "none": _none,
}
