"""The path ranking: what every weight contributes to the rise of both losses along the optimiser's first step.

On a model that recites its rows both gradients nearly vanish, so slopes at the start say little of what a long step
costs. Contributions are integrals along the step (Sundararajan et al., arXiv 1703.01365), (13) and (14) of method.md.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fillm.data import SampleSet
from fillm.errors import UsageError
from fillm.rank.path_rounds import Rounds
from fillm.rank.path_step import ForwardLosses, LossesAlone, SignStep, find_length
from fillm.rank.scoring import Job, Scores, unit_rows
from fillm.rank.soir import mean_gradient, refuse_overflow
from fillm.rank.units import groups_of
from fillm.statistics import CombinedMeans, Groups, inner, squared_norm

INCOMPLETE = 0.05  # of the forget loss's rise: what contributions may miss of a rise before it is a warning


def rank_path(job: Job) -> Scores:
    """Scores weights by gain less so many times the damage, (14), in `--path-rounds`, (15); of a unit the sum.

    Raises:
        UsageError: weights too narrow to be moved, or a forget loss that does not rise by `--path-rise`.
        NumericsError: naming sample and tensor.
    """
    _refuse_narrow(job)
    passes, losses = job.passes, ForwardLosses(job.capture)
    v = mean_gradient(passes, "forget", "forget pass", job.capture, job.forget)
    norms = {name: math.sqrt(squared_norm(mean)) for name, mean in v.items()}
    step, groups = SignStep(job.capture.parameters, v), groups_of(job.model, job.scope, job.config.granularity)
    reached = {name: _reached(signs, groups.get(name)) for name, signs in step.signs.items()}
    passes.run("retain", "retain pass, forward", losses, job.retain, LossesAlone())
    rounds = Rounds(job.scope, step.signs, job.config.path_rounds, job.config.path_keep)
    records = []
    for number in range(1, rounds.count + 1):
        path = _Path(job, step, groups, CombinedMeans(v), number)
        records.append(path.follow(losses))
        if number < rounds.count:
            rounds.leave_out(path.scores())
    record = records[-1] | ({"rounds": records} if rounds.count > 1 else {})
    saved = {}
    if job.config.granularity == "element":
        saved = {f"scores/{name}": score for name, score in rounds.in_one_order(path.scores()).items()}
    return Scores(path.rows(norms, reached), saved, record={"path": record})


def _refuse_narrow(job: Job) -> None:
    for name, parameter in job.capture.parameters.items():
        if torch.finfo(parameter.dtype).bits < 32:
            raise UsageError(
                f"--method path moves weights by less than {str(parameter.dtype).removeprefix('torch.')} can tell "
                f"apart ({name}); give --dtype float32, or --include what is float32"
            )


class _Path:
    """A round: the passes along a step, and what they add up to.

    Attributes:
        gain, damage: of every tensor in scope, [units] in float64: its weights' part in the rise of either loss.
        score: likewise, `gain - weight * damage`.
    """

    def __init__(
        self, job: Job, step: SignStep, groups: Mapping[str, Groups], sums: CombinedMeans, number: int
    ) -> None:
        self.job, self.step, self.sums, self.groups = job, step, sums, groups
        several = job.config.path_rounds > 1
        self._stage = f"round-{number}-" if number > 1 else ""
        self._label = f"round {number} of {job.config.path_rounds}, " if several else ""
        self.score = {name: self._by_unit(name) for name in step.signs}
        self.gain = {name: torch.zeros_like(score) for name, score in self.score.items()}
        self.damage = {name: torch.zeros_like(score) for name, score in self.score.items()}

    def follow(self, losses: ForwardLosses) -> dict[str, Any]:
        """Finds the step's length and integrates up to it; for the record, what both losses did.

        Args:
            losses: what passes that ask for nothing else go through.
        """
        length, forget_rise, tried = self._length(losses)
        self._integrate(length)
        with self.step.at(length):
            self._losses("retain-end", "retain pass at the end of the step, forward", losses, self.job.retain)
        moved = sum(int(signs.count_nonzero()) for signs in self.step.signs.values())
        record = {
            "length": length,
            "lengths_tried": tried,
            "weights_moved": moved,
            "forget_rise": forget_rise,
            "forget_contributions": float(sum(gain.sum() for gain in self.gain.values())),
            "retain_rise": self._mean("retain-end") - float(self.job.passes.losses["retain"].mean()),
            "retain_contributions": float(sum(damage.sum() for damage in self.damage.values())),
        }
        _report(self.job, record, self._label)
        return record

    def _losses(
        self, stage: str, label: str, losses: ForwardLosses, samples: SampleSet, any_loss: bool = False
    ) -> None:
        self.job.passes.run(self._stage + stage, self._label + label, losses, samples, LossesAlone(any_loss))

    def _mean(self, stage: str) -> float:
        """The mean loss over the samples of a set, as a pass of this round found it."""
        return float(self.job.passes.losses[self._stage + stage].mean())

    def _length(self, losses: ForwardLosses) -> tuple[float, float, int]:
        """How far the step goes, by how much the forget loss has risen there, and how many lengths were tried."""
        wanted, rises = self.job.config.path_rise, dict[float, float]()
        start = float(self.job.passes.losses["forget"].mean())

        def risen(length: float) -> float:
            stage, label = f"length-{len(rises) + 1}", f"search of the step's length, {len(rises) + 1}"
            with self.step.at(length):
                self._losses(stage, label, losses, self.job.forget, any_loss=True)
            rise = self._mean(stage) - start
            # The model as it came has finite losses: where one is not, this step is too long for its numbers.
            rises[length] = rise if math.isfinite(rise) else math.inf
            return rises[length]

        length = find_length(risen, wanted)
        asked = f"--path-rise {wanted:g}: {self._label}"
        if length is None:
            most = max(rises.values())
            raise UsageError(
                f"{asked}along the sign of its gradient the forget loss rises by {max(most, 0.0):.3g} at most, at "
                f"changes of up to {max(rises):.3g} of every weight; give less, or a wider --include"
            )
        if not rises[length] <= 2.0 * wanted:
            raise UsageError(
                f"{asked}the forget loss jumps past it, to a rise of {rises[length]:.3g} at a change of "
                f"{length:.3g} of every weight; give another"
            )
        return length, rises[length], len(rises)

    def _integrate(self, length: float) -> None:
        """By the midpoint rule."""
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
        passes, stage, label = self.job.passes, self._stage + stage, self._label + label
        self.sums.weigh(factor * piece, len(samples))
        passes.run(stage, label, self.job.capture, samples, self.sums)
        refuse_overflow(passes, stage, label, self.job.capture, samples, self.sums.total)
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

    def scores(self) -> dict[str, Tensor]:
        """Of every weight, in the place of the sums.

        What the step does not move forgets nothing: it stands last, behind what costs more than it gains.
        """
        signs = self.step.signs
        return {
            name: total.mul_(signs[name]).masked_fill_(signs[name] == 0, -math.inf)
            for name, total in self.sums.total.items()
        }

    def rows(self, norms: Mapping[str, float], reached: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The ranking's rows.

        Args:
            norms: of the mean forget gradients, by tensor.
            reached: [units] bool, by tensor: whether a forget gradient reaches any weight of a unit.
        """
        rows: list[dict[str, Any]] = []
        for info in self.job.scope:
            name, group = info.name, self.groups.get(info.name)
            if self.job.config.granularity == "head" and group is None:
                continue
            columns = {"forget_norm": norms[name], "note": "" if bool(reached[name].any()) else "unused"}
            idle = None if group is None else ~reached[name]
            rows += unit_rows(info, group, self.score[name], self.gain[name], self.damage[name], columns, idle)
        return rows


def _reached(signs: Tensor, group: Groups | None) -> Tensor:
    return signs.any()[None] if group is None else group.sum_entries(signs.abs()) != 0


def _report(job: Job, record: dict[str, Any], label: str) -> None:
    pairs = [(record[f"{which}_rise"], record[f"{which}_contributions"]) for which in ("forget", "retain")]
    (forget, gain), (retain, damage) = pairs
    job.passes.console.note(
        f"{label}at a change of {record['length']:.3g} of every weight the forget loss has risen by {forget:.4g} and "
        f"the retain loss by {retain:.4g}; what the weights contribute adds up to {gain:.4g} and {damage:.4g}"
    )
    missed = max(abs(rise - total) for rise, total in pairs) / forget
    if missed > INCOMPLETE:
        job.passes.console.warn(
            f"{label}contributions miss {100.0 * missed:.0f} % of the forget loss's rise: give more --path-points than "
            f"{job.config.path_points}, or a smaller --path-rise"
        )
