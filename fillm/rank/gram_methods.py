"""Methods that ask for inner products of gradients alone, exact or sketched (docs/method.md, "The Gram form")."""

import math
from collections.abc import Callable

import fillm_kernels as fk
import pyarrow as pa
import torch
from torch import Tensor

from fillm.rank.gram_answers import Answer, answer, without_noise
from fillm.rank.gram_sources import Sketched, exact_products, sketch_sets, sketched_products_of
from fillm.rank.layer_groups import in_groups
from fillm.rank.scoring import Job, Scores, from_update, ranked_row
from fillm.rank.soir import Influence, mean_gradient
from fillm.rank.units import retain_changes
from fillm.statistics import (
    BAR,
    BRACKET_SLACK,
    Estimate,
    WeightedSum,
    explained,
    inner,
    squared_norm,
    top_set_confidence,
    widened,
)

_JUDGED = ("rest", "error", "apart")  # of an answer, by those of other tensors
TOP_PART = 0.1  # of the tensors: the set that a confidence is stated for


def rank_by_gram(job: Job) -> Scores:
    """Runs `soir`, `soir-per-sample`, `first-order` or `memflex` on inner products, sketched or exact."""
    config = job.config
    if config.damping_dimension == "sketch":
        return published_scores(job, sketch_sets(job))
    with_update = config.asks_for_update
    source = sketched_products_of(job) if config.sketched else exact_products(job)
    answers = without_noise([answer(one, config, keep_coefficients=with_update) for one in source])
    if with_update:
        return _through_update(job, answers)
    scores = scores_of(job, answers)
    # memflex ranks by sizes, which are exact, within what it keeps: its notes say which cosines are not sure.
    if config.sketched and config.canonical_method != "memflex":
        scores.record["sketch"] = _reliability(scores, ascending=config.objective != "forget")
    return scores


def scores_of(job: Job, answers: list[Answer]) -> Scores:
    """From what the inner products of every tensor say to the scores of the job's method, with their bounds."""
    return _METHODS[job.config.canonical_method](job, answers)


def published_scores(job: Job, sets: Sketched) -> Scores:
    """What published code makes of sketches: lengths are the sketches' own, and (1) divides by their size."""
    config, rows = job.config, []
    for info in job.scope:
        sketches = sets.retain.sketches(info.name).float()
        target = sets.forget.sketches(info.name).double().mean(0)
        squares = sketches.double().square().sum(1)
        found = fk.soir_sweep(sketches, target.float(), squares, config.damping, numel=config.sketch_dim)
        size, lambda_ = float(target.norm()), float(found.damping)
        rows.append(
            ranked_row(
                info,
                float(found.score),
                damping=lambda_,
                mean_retain_sq_norm=float(squares.mean()),
                forget_norm=size,
                predicted_forget_gain=float(found.gain),
                note="" if lambda_ > 0 else "no retain gradient" if size > 0 else "unused",
            )
        )
    return Scores(rows)


def _through_update(job: Job, answers: list[Answer]) -> Scores:
    """`u = -(1/lambda) (v - (1/n) sum_i c_i g_i)` itself, from coefficients that the Gram matrix gave."""
    of = {one.info.name: one for one in answers}
    return in_groups(job, lambda part: _formed(part, [of[info.name] for info in part.scope]))


def _formed(job: Job, answers: list[Answer]) -> Scores:
    v = mean_gradient(job.passes, "forget", "forget pass", job.capture, job.forget)
    weights = {a.info.name: a.coefficients[:, 0] for a in answers if a.coefficients is not None}
    summed = WeightedSum({name: v[name] for name in weights}, weights, len(job.retain))
    job.passes.run("update", "update pass", job.capture.like(sorted(weights)), job.retain, summed)
    influence = Influence(forget_mean=v)
    for one in answers:
        name = one.info.name
        u = summed.total[name].sub_(v[name]).div_(one.lambda_) if name in weights else torch.zeros_like(v[name])
        influence.update[name] = u
        influence.lambda_[name], influence.mean_retain_sq_norm[name] = one.lambda_, one.mean_q
        influence.forget_norm[name] = math.sqrt(squared_norm(v[name]))
        influence.gain[name] = -inner(v[name], u)
        if one.note:
            influence.notes[name] = one.note
    return from_update(job, influence)


def _left(answers: list[Answer]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`lambda |u| / |v|` and its bounds for every answer, [m] each; the noise of all tensors weighed together."""
    left = [Estimate(one.rest, one.error) for one in answers]
    noisy = [row for row, one in enumerate(answers) if one.estimated]
    if noisy:
        rest, error, apart = (torch.stack([getattr(answers[row], n) for row in noisy]) for n in _JUDGED)
        taken = explained(1.0 - rest, widened(error, apart))
        for row, value, wide in zip(noisy, taken.value, taken.error, strict=True):
            left[row] = Estimate(1.0 - value, wide)
    # Of exact inner products, a rest above 1 is no noise.
    highest = [1.0 if one.estimated else math.inf for one in answers]
    parts = [(one.value, *one.bounds(0.0, high)) for one, high in zip(left, highest, strict=True)]
    return [tuple(part.clamp(min=0.0).sqrt() for part in three) for three in parts]


def _lengths(one: Answer, left: tuple[Tensor, Tensor, Tensor], tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """`|u|` and its bounds, [m] each; 0 of an unused tensor, infinite where the retain set has no gradient."""
    if one.lambda_ == 0.0:
        size = torch.where(one.norms > 0, torch.inf, 0.0)
        return size, size, size
    size, low, high = (part * one.norms / one.lambda_ for part in left)
    # Where v and w all but cancel, rounding of the inner products bounds the answer, exact or not.
    slack = BRACKET_SLACK * one.norms / one.lambda_
    near = slack > tolerance * size
    return size, torch.where(near, (low - slack).clamp(min=0.0), low), torch.where(near, high + slack, high)


def _soir(job: Job, answers: list[Answer]) -> Scores:
    config, rows = job.config, []
    for one, left in zip(answers, _left(answers), strict=True):
        size, low, high = _lengths(one, left, config.tolerance)
        score = Estimate(size, torch.zeros_like(size))
        if config.objective != "forget":
            score = _objective(one, config.objective)
            low, high = score.bounds(0.0 if config.objective == "retain" else -math.inf, math.inf)
        rows.append(
            ranked_row(
                one.info,
                float(score.value[0]),
                damping=one.lambda_,
                mean_retain_sq_norm=one.mean_q,
                forget_norm=float(one.norms[0]),
                predicted_forget_gain=float(one.gain[0]),
                retain_damage=0.5 * float(one.mean_square_dot[0]),
                note=one.note,
            )
            | {"score_low": float(low[0]), "score_high": float(high[0])}
        )
    return Scores(rows)


def _objective(one: Answer, objective: str) -> Estimate:
    """Equation (8): damage, or the predicted retain change at a given rise of the forget loss, with its error, [1]."""
    damage = Estimate(0.5 * one.mean_square_dot, 0.5 * one.square_error)
    if objective == "retain":
        return damage
    if one.lambda_ == 0.0:
        value = torch.where(one.norms > 0, 0.0, torch.inf)
        return Estimate(value, torch.zeros_like(value))
    value = retain_changes(one.gain, one.mean_dot, one.mean_square_dot)
    # The change is linear in both moments; what noise does to one says little of the other.
    first = retain_changes(one.gain, one.mean_dot + one.dot_error, one.mean_square_dot) - value
    second = retain_changes(one.gain, one.mean_dot, one.mean_square_dot + one.square_error) - value
    return Estimate(value, torch.where(value.isfinite(), torch.hypot(first, second), 0.0))


def _per_sample(job: Job, answers: list[Answer]) -> Scores:
    """Equation (3) for every forget sample alone; a tensor's own score is the mean over the samples."""
    rows, sizes = [], []
    for one, left in zip(answers, _left(answers), strict=True):
        size, low, high = _lengths(one, left, job.config.tolerance)
        sizes.append(torch.stack([size, low, high]))
        rows.append(
            ranked_row(
                one.info,
                float(size.mean()),
                damping=one.lambda_,
                mean_retain_sq_norm=one.mean_q,
                note=one.note,
            )
            | {"score_low": float(low.mean()), "score_high": float(high.mean())}
        )
    return Scores(rows, per_sample=_per_sample_table(job, answers, sizes))


def _per_sample_table(job: Job, answers: list[Answer], sizes: list[Tensor]) -> pa.Table:
    """A ranking for every forget sample: `sample`, `rank`, `name`, `score`, `score_low`, `score_high`, `note`."""
    columns: dict[str, list[object]] = {
        name: [] for name in ("sample", "rank", "name", "score", "score_low", "score_high", "note")
    }
    for position, sample in enumerate(job.forget):
        scored = []
        for one, size in zip(answers, sizes, strict=True):
            score, low, high = size[:, position].tolist()
            note = one.note or ("unused" if score == 0.0 else "")
            scored.append((note == "unused", -score, one.info.name, low, high, note))
        for rank, (_, score, name, low, high, note) in enumerate(sorted(scored), start=1):
            values = (sample.id, rank, name, -score, low, high, note)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    types = [pa.string(), pa.int64(), pa.string(), pa.float64(), pa.float64(), pa.float64(), pa.string()]
    return pa.table({name: pa.array(values, t) for (name, values), t in zip(columns.items(), types, strict=True)})


def _first_order(job: Job, answers: list[Answer]) -> Scores:
    rows = []
    for one in answers:
        score = float(one.total.value[0])
        low, high = one.total.bounds(0.0, math.inf)
        fields = {"mean_retain_sq_norm": one.mean_q, "note": one.note}
        rows.append(ranked_row(one.info, score, **fields) | {"score_low": float(low[0]), "score_high": float(high[0])})
    return Scores(rows)


def _memflex(job: Job, answers: list[Answer]) -> Scores:
    config, rows = job.config, []
    for one in answers:
        size = one.mean_absolute
        cosine, error = one.cosine
        kept = cosine < config.similarity and size > config.magnitude
        unsure = abs(cosine - config.similarity) <= BAR * error and size > config.magnitude
        note = f"cosine {cosine:.3f}" + (f" +- {BAR * error:.3f}" if error else "") + ("" if kept else ", not kept")
        note = one.note if one.note == "unused" else note + (", within the sketch's error" if unsure and error else "")
        rows.append(ranked_row(one.info, size, forget_norm=float(one.norms[0]), note=note, tier=0 if kept else 1))
    return Scores(rows)


def _reliability(scores: Scores, ascending: bool) -> dict[str, float]:
    """What `run.yaml` says of the error bars: the widest, and how sure the best tenth of the tensors is."""
    used = [row for row in scores.rows if "unused" not in row.get("note", "") and math.isfinite(row["score"])]
    value = torch.tensor([row["score"] for row in used], dtype=torch.float64)
    width = torch.tensor([row["score_high"] - row["score_low"] for row in used], dtype=torch.float64) / 2.0
    count = max(1, round(TOP_PART * len(scores.rows)))
    # Largest first, infinite scores lead, whatever the sketch says of the others.
    leading = 0 if ascending else sum(row["score"] == math.inf for row in scores.rows)
    sure = top_set_confidence(-value if ascending else value, width / BAR, max(0, count - leading))
    relative = width / value.abs().clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "widest_relative_error_bar": float(relative.max()) if len(used) else 0.0,
        "median_relative_error_bar": float(relative.median()) if len(used) else 0.0,
        "top_set": count,
        "top_set_confidence": sure,
    }


_METHODS: dict[str, Callable[[Job, list[Answer]], Scores]] = {
    "soir": _soir,
    "soir-per-sample": _per_sample,
    "first-order": _first_order,
    "memflex": _memflex,
}
