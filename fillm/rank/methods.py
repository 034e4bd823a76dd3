"""Every localisation method: from a model and two sets of samples to the rows of a ranking (docs/method.md)."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fillm.capture import Capture
from fillm.data import SampleSet
from fillm.errors import ModelError, UsageError
from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.passes import Passes
from fillm.rank.soir import Influence, mean_gradient, rank_soir
from fillm.rank.units import gains, groups_of, numels, retain_changes, sizes
from fillm.statistics import Groups, StepDots, accumulator_dtype, inner, squared_norm


@dataclass
class Job:
    """What a method works on."""

    config: RankConfig
    model: nn.Module
    scope: list[TensorInfo]
    capture: Capture
    forget: SampleSet
    retain: SampleSet
    passes: Passes
    base_model: nn.Module | None = None


@dataclass
class Scores:
    """What a method says.

    Attributes:
        rows: fields of the ranking's table, a dict per ranked unit; `tier` (0 unless said) sorts before the score.
        update: what `update.safetensors` holds.
        visited_again: retain samples that needed a further pass.
    """

    rows: list[dict[str, Any]]
    update: dict[str, Tensor] = field(default_factory=dict)
    visited_again: int = 0


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
    return _METHODS[job.config.canonical_method](job)


def _row(info: TensorInfo, score: float, **fields: Any) -> dict[str, Any]:
    row = {"name": info.name, "kind": info.kind, "layer": info.layer, "numel": info.numel, "score": score}
    return row | {"score_low": score, "score_high": score} | fields


def _soir(job: Job) -> Scores:
    config = job.config
    influence = rank_soir(
        job.passes,
        job.capture,
        job.forget,
        job.retain,
        damping=config.damping,
        tolerance=config.tolerance,
        need_update=config.needs_update,
    )
    if config.needs_update:
        return _from_update(job, influence)
    rows = []
    for info in job.scope:
        low, high = influence.low[info.name], influence.high[info.name]
        middle = low if low == high else 0.5 * (low + high)
        rows.append(_row(info, middle, **_columns(influence, info.name)) | {"score_low": low, "score_high": high})
    return Scores(rows, visited_again=influence.visited_again)


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
    return _from_update(job, influence)


def _columns(influence: Influence, name: str) -> dict[str, Any]:
    return {
        "damping": influence.lambda_[name],
        "mean_retain_sq_norm": influence.mean_retain_sq_norm[name],
        "forget_norm": influence.forget_norm[name],
        "predicted_forget_gain": influence.gain[name],
        "note": influence.notes.get(name, ""),
    }


def _from_update(job: Job, influence: Influence) -> Scores:
    """Scores by the size of `u`, its damage or its trade-off, for whatever the settings rank."""
    config = job.config
    groups = groups_of(job.model, job.scope, config.granularity)
    element = config.granularity == "element"
    dots = None
    if config.objective != "forget":
        dots = StepDots(influence.update, len(job.retain), groups, element=element)
        job.passes.run("damage", "damage pass", job.capture, job.retain, dots)
    rows: list[dict[str, Any]] = []
    saved = dict(influence.update)
    for info in job.scope:
        name, group = info.name, groups.get(info.name)
        v, u, columns = influence.forget_mean[name], influence.update[name], _columns(influence, name)
        if config.granularity == "head" and group is None:
            continue
        reached = v != 0 if element else sizes(v, group, "l2") > 0
        idle = ~reached & (u == 0 if element else sizes(u, group, "l2") == 0)
        # Without curvature (2) has no finite u, and no step along v costs the retain set anything.
        free = influence.lambda_[name] == 0.0
        gain = torch.where(reached, float("inf"), 0.0).double() if free else gains(v, u, group, element)
        damage = None if dots is None else 0.5 * dots.mean_square[name].double()
        if config.objective == "forget":
            score = gain if free else u.abs().double() if element else sizes(u, group, config.effective_score)
        elif config.objective == "retain":
            score = damage.reshape(idle.shape)
        elif free:
            score = torch.where(reached, 0.0, float("inf")).double()
        else:
            score = retain_changes(gain, dots.mean[name].double(), dots.mean_square[name].double())
        if element:
            if config.objective != "forget":
                score = torch.where(idle, float("inf"), score)  # an edit of nothing does no damage, and is no use
            if config.objective != "forget" or free:
                saved[f"scores/{name}"] = score.float()
            summed = (score if config.objective == "forget" else score[score.isfinite()]).sum()
            total = None if damage is None else damage.sum()[None]
            rows += _unit_rows(info, None, summed[None], None, total, columns)
        else:
            rows += _unit_rows(info, group, score.reshape(-1), gain, damage, columns, idle if group else None)
    keep = config.save_update or config.granularity != "tensor"
    return Scores(rows, saved if keep else {}, influence.visited_again)


def _unit_rows(
    info: TensorInfo,
    group: Groups | None,
    score: Tensor,
    gain: Tensor | None,
    damage: Tensor | None,
    columns: dict[str, Any],
    idle: Tensor | None = None,
) -> list[dict[str, Any]]:
    """A row for every unit of one tensor; those in `idle`, [units] bool, are noted as unused."""
    rows = []
    values, sizes_ = score.tolist(), numels(info, group)
    damages = None if damage is None else damage.reshape(-1).tolist()
    gains_ = None if gain is None else gain.reshape(-1).tolist()
    for index, value in enumerate(values):
        row = _row(info, value, **columns)
        if group is not None:
            row |= {"index": index, "numel": sizes_[index]}
        if damages is not None:
            row["retain_damage"] = damages[index]
        if gains_ is not None:
            row["predicted_forget_gain"] = gains_[index]
        if idle is not None and bool(idle[index]):
            row["note"] = "unused"
        rows.append(row)
    return rows


def _weights(job: Job, signed: Callable[[str], Tensor], columns: Callable[[str], dict[str, Any]]) -> Scores:
    """Scores summed from one signed number a weight, whose absolute value is the weight's score."""
    config, rows, saved = job.config, [], {}
    groups = groups_of(job.model, job.scope, config.granularity)
    for info in job.scope:
        group = groups.get(info.name)
        if config.granularity == "head" and group is None:
            continue
        weights = signed(info.name)
        magnitude = weights.abs()
        score = magnitude.sum(dtype=torch.float64)[None] if group is None else group.sum_entries(magnitude)
        rows += _unit_rows(info, group, score, None, None, columns(info.name))
        if config.granularity != "tensor":
            saved[info.name] = weights
    return Scores(rows, saved)


def _mean_columns(v: dict[str, Tensor], r: dict[str, Tensor] | None = None) -> Callable[[str], dict[str, Any]]:
    def columns(name: str) -> dict[str, Any]:
        norm = math.sqrt(squared_norm(v[name]))
        unused = norm == 0.0 and (r is None or not bool(r[name].any()))
        return {"forget_norm": norm, "note": "unused" if unused else ""}

    return columns


def _saliency(job: Job) -> Scores:
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    return _weights(job, lambda name: v[name], _mean_columns(v))


def _wagle(job: Job) -> Scores:
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    r = mean_gradient(job.passes, "retain", "retain pass", job.capture, job.retain)
    theta = job.capture.parameters
    return _weights(job, lambda name: (theta[name].detach() - r[name] / job.config.mu) * v[name], _mean_columns(v, r))


def _memflex(job: Job) -> Scores:
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    r = mean_gradient(job.passes, "retain", "retain pass", job.capture, job.retain)
    rows = []
    for info in job.scope:
        a, b = v[info.name], r[info.name]
        norms = math.sqrt(squared_norm(a)), math.sqrt(squared_norm(b))
        cosine = inner(a, b) / (norms[0] * norms[1]) if min(norms) > 0 else 0.0
        size = float(a.abs().mean(dtype=torch.float64))
        kept = cosine < job.config.similarity and size > job.config.magnitude
        note = (
            "unused" if norms[0] == 0.0 and norms[1] == 0.0 else f"cosine {cosine:.3f}" + ("" if kept else ", not kept")
        )
        rows.append(_row(info, size, forget_norm=norms[0], note=note, tier=0 if kept else 1))
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
        now, before = theta[info.name].detach(), base[info.name].detach()
        dtype = accumulator_dtype(torch.promote_types(now.dtype, before.dtype))
        shift = now.to(dtype) - before.to(now.device, dtype)
        length, size = math.sqrt(squared_norm(shift)), math.sqrt(squared_norm(before))
        relative = length / size if size else float("inf") if length else 0.0
        element = job.config.granularity == "element"
        score = shift.abs().double().sum()[None] if element else sizes(shift, group, job.config.effective_score)
        rows += _unit_rows(info, group, score, None, None, {"note": f"relative {relative:.3e}"})
        if job.config.granularity != "tensor":
            saved[info.name] = shift
    return Scores(rows, saved)


def _random(job: Job) -> Scores:
    def draw(info: TensorInfo) -> float:
        digest = hashlib.sha256(f"{job.config.seed}:{info.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return Scores([_row(info, draw(info)) for info in job.scope])


def _none(job: Job) -> Scores:
    return Scores([_row(info, float(len(job.scope) - i)) for i, info in enumerate(job.scope)])


_METHODS: dict[str, Callable[[Job], Scores]] = {
    "soir": _soir,
    "soir-sum": _soir_sum,
    "memflex": _memflex,
    "parameter-shift": _parameter_shift,
    "wagle": _wagle,
    "saliency": _saliency,
    "random": _random,
    "none": _none,
}
