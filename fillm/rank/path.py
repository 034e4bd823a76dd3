"""The path ranking: what every weight contributes to the rise of both losses along the optimiser's first step.

On a model that recites its rows both gradients nearly vanish, so slopes at the start say little of what a long step
costs. Contributions are integrals along the step (Sundararajan et al., arXiv 1703.01365), (13) and (14) of method.md.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fillm.data import SampleSet
from fillm.errors import NumericsError, UsageError
from fillm.rank.path_step import ForwardLosses, LossesAlone, SignStep, find_length
from fillm.rank.scoring import Job, Scores, unit_rows
from fillm.rank.soir import mean_gradient, refuse_overflow
from fillm.rank.units import groups_of
from fillm.statistics import CombinedMeans, Groups, inner, squared_norm

INCOMPLETE = 0.05  # of the forget loss's rise: what contributions may miss of a rise before it is a warning


def rank_path(job: Job) -> Scores:
    """Scores weights by gain less so many times the damage, (14); of a unit the sum over its weights.

    Raises:
        UsageError: weights too narrow to be moved, or a forget loss that does not rise by `--path-rise`.
        NumericsError: naming sample and tensor.
    """
    _refuse_narrow(job)
    passes, losses = job.passes, ForwardLosses(job.capture)
    v = mean_gradient(passes, "forget", "forget pass", job.capture, job.forget)
    norms = {name: math.sqrt(squared_norm(mean)) for name, mean in v.items()}
    step = SignStep(job.capture.parameters, v)
    passes.run("retain", "retain pass, forward", losses, job.retain, LossesAlone())
    length, forget_rise, tried = _length(job, step, losses)
    path = _Path(job, step, CombinedMeans(v))
    path.follow(length)
    with step.at(length):
        passes.run("retain-end", "retain pass at the end of the step, forward", losses, job.retain, LossesAlone())
    retain_rise = _mean(job, "retain-end") - _mean(job, "retain")
    record = {
        "length": length,
        "lengths_tried": tried,
        "forget_rise": forget_rise,
        "forget_contributions": float(sum(gain.sum() for gain in path.gain.values())),
        "retain_rise": retain_rise,
        "retain_contributions": float(sum(damage.sum() for damage in path.damage.values())),
    }
    _report(job, record)
    rows, saved = path.rows(norms)
    return Scores(rows, saved, record={"path": record})


def _refuse_narrow(job: Job) -> None:
    for name, parameter in job.capture.parameters.items():
        if torch.finfo(parameter.dtype).bits < 32:
            raise UsageError(
                f"--method path moves weights by less than {str(parameter.dtype).removeprefix('torch.')} can tell "
                f"apart ({name}); give --dtype float32, or --include what is float32"
            )


def _mean(job: Job, stage: str) -> float:
    """The mean loss over the samples of a set, as a pass found it."""
    return float(job.passes.losses[stage].mean())


def _length(job: Job, step: SignStep, losses: ForwardLosses) -> tuple[float, float, int]:
    """How far the step goes, by how much the forget loss has risen there, and how many lengths were tried."""
    wanted, rises = job.config.path_rise, dict[float, float]()

    def risen(length: float) -> float:
        stage, label = f"length-{len(rises) + 1}", f"search of the step's length, {len(rises) + 1}"
        try:
            with step.at(length):
                job.passes.run(stage, label, losses, job.forget, LossesAlone())
        except NumericsError:  # the model as it came has finite losses: this step is too long for its numbers
            rises[length] = math.inf
        else:
            rises[length] = _mean(job, stage) - _mean(job, "forget")
        return rises[length]

    length = find_length(risen, wanted)
    if length is None:
        most = max(rises.values())
        raise UsageError(
            f"--path-rise {wanted:g}: along the sign of its gradient the forget loss rises by {max(most, 0.0):.3g} at "
            f"most, at changes of up to {max(rises):.3g} of every weight; give less, or a wider --include"
        )
    if not rises[length] <= 2.0 * wanted:
        raise UsageError(
            f"--path-rise {wanted:g}: the forget loss jumps past it, to a rise of {rises[length]:.3g} at a change of "
            f"{length:.3g} of every weight; give another"
        )
    return length, rises[length], len(rises)


class _Path:
    """The passes along a step, and what they add up to.

    Attributes:
        gain, damage: of every tensor in scope, [units] in float64: its weights' part in the rise of either loss.
        score: likewise, `gain - weight * damage`.
    """

    def __init__(self, job: Job, step: SignStep, sums: CombinedMeans) -> None:
        self.job, self.step, self.sums = job, step, sums
        self.groups = groups_of(job.model, job.scope, job.config.granularity)
        self.score = {name: self._by_unit(name) for name in step.signs}
        self.gain = {name: torch.zeros_like(score) for name, score in self.score.items()}
        self.damage = {name: torch.zeros_like(score) for name, score in self.score.items()}

    def follow(self, length: float) -> None:
        """Integrates up to a length by the midpoint rule."""
        points, weight = self.job.config.path_points, self.job.config.path_weight
        for point in range(points):
            with self.step.at(length * (point + 0.5) / points):
                about = f"at point {point + 1} of {points}"
                piece = length / points
                self._pass(f"forget-{point + 1}", f"forget pass {about}", self.job.forget, 1.0, piece, self.gain)
                self._pass(f"retain-{point + 1}", f"retain pass {about}", self.job.retain, -weight, piece, self.damage)

    def _pass(
        self, stage: str, label: str, samples: SampleSet, factor: float, piece: float, total: dict[str, Tensor]
    ) -> None:
        self.sums.weigh(factor * piece, len(samples))
        self.job.passes.run(stage, label, self.job.capture, samples, self.sums)
        refuse_overflow(self.job.passes, stage, label, self.job.capture, samples, self.sums.total)
        # Gain and damage of single weights would be a second accumulator; of units, what a pass adds tells them apart.
        for name in total:
            score = self._by_unit(name)
            total[name] += (score - self.score[name]) / factor
            self.score[name] = score

    def _by_unit(self, name: str) -> Tensor:
        """`sum_p s[p] total[p]` by unit, [units], float64."""
        total, signs, group = self.sums.total[name], self.step.signs[name], self.groups.get(name)
        if group is None:
            return torch.tensor([inner(total, signs)], dtype=torch.float64)
        return group.sum_entries(total * signs).cpu()

    def rows(self, norms: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The ranking's rows, and the scores of single weights where these are ranked."""
        rows: list[dict[str, Any]] = []
        saved: dict[str, Tensor] = {}
        for info in self.job.scope:
            name, group = info.name, self.groups.get(info.name)
            if self.job.config.granularity == "head" and group is None:
                continue
            signs = self.step.signs[name]
            columns = {"forget_norm": norms[name], "note": "" if bool(signs.any()) else "unused"}
            rows += unit_rows(
                info, group, self.score[name], self.gain[name], self.damage[name], columns, _idle(signs, group)
            )
            if self.job.config.granularity == "element":
                # What the step does not move forgets nothing: it stands last, behind what costs more than it gains.
                saved[f"scores/{name}"] = self.sums.total[name].mul_(signs).masked_fill_(signs == 0, -math.inf)
        return rows, saved


def _idle(signs: Tensor, group: Groups | None) -> Tensor | None:
    return None if group is None else group.sum_entries(signs.abs()) == 0


def _report(job: Job, record: dict[str, Any]) -> None:
    pairs = [(record[f"{which}_rise"], record[f"{which}_contributions"]) for which in ("forget", "retain")]
    (forget, gain), (retain, damage) = pairs
    job.passes.console.note(
        f"at a change of {record['length']:.3g} of every weight the forget loss has risen by {forget:.4g} and the "
        f"retain loss by {retain:.4g}; what the weights contribute adds up to {gain:.4g} and {damage:.4g}"
    )
    missed = max(abs(rise - total) for rise, total in pairs) / forget
    if missed > INCOMPLETE:
        job.passes.console.warn(
            f"contributions miss {100.0 * missed:.0f} % of the forget loss's rise: give more --path-points than "
            f"{job.config.path_points}, or a smaller --path-rise"
        )
