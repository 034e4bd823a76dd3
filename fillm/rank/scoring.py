"""From what a method has computed for every tensor to the rows of a ranking, at any granularity (docs/method.md)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from fillm.capture import Capture
from fillm.data import SampleSet
from fillm.models import TensorInfo
from fillm.models.sharded_tensors import whole
from fillm.rank.config import RankConfig
from fillm.rank.passes import Passes
from fillm.rank.soir import Influence, count_visited
from fillm.rank.units import gains, groups_of, numels, retain_changes, sizes
from fillm.statistics import Groups, SketchStore, StepDots, any_entry, squared_norm


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
    model_fingerprint: str = ""
    stored: SketchStore | None = None  # what the retain set's sketches were read from
    largest: float = 0.0  # the largest of `Scores.sizes` of the groups of layers before this one


@dataclass
class Scores:
    """What a method says.

    Attributes:
        rows: fields of the ranking's table, a dict per ranked unit; `tier` (0 unless said) sorts before the score.
        update: what `update.safetensors` holds.
        revisited: by tensor, the retain samples that needed a further pass, as in `Influence`.
        sizes, noise: as in `Influence`, of methods that tell rounding noise so.
        per_sample: a ranking for every forget sample, one after the other.
        record: what else `run.yaml` is to say.
    """

    rows: list[dict[str, Any]]
    update: dict[str, Tensor] = field(default_factory=dict)
    revisited: dict[str, Tensor] = field(default_factory=dict)
    per_sample: pa.Table | None = None
    record: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    noise: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, influence: Influence, rows: list[dict[str, Any]], update: dict[str, Tensor]) -> "Scores":
        """Rows and updates that were made from what passes say of the tensors."""
        return cls(rows, update, influence.revisited, sizes=influence.sizes, noise=influence.noise)

    @property
    def visited_again(self) -> int:
        """Number of retain samples that needed a further pass, for whichever tensor."""
        return count_visited(self.revisited)

    def add(self, further: "Scores") -> None:
        """Takes what is said of further tensors."""
        self.rows += further.rows
        self.update |= further.update
        self.revisited |= further.revisited
        self.sizes |= further.sizes
        self.noise |= further.noise

    def replace(self, names: Iterable[str], other: "Scores") -> None:
        """Takes back what was said of some tensors and says `other` of them."""
        taken = set(names)
        self.rows[:] = [row for row in self.rows if row["name"] not in taken]
        for name in taken:
            self.revisited.pop(name, None)
        self.add(other)


def ranked_row(info: TensorInfo, score: float, **fields: Any) -> dict[str, Any]:
    """A row of the table for a whole tensor with an exact score; `fields` add to it or replace."""
    row = {"name": info.name, "kind": info.kind, "layer": info.layer, "numel": info.numel, "score": score}
    return row | {"score_low": score, "score_high": score} | fields


def influence_columns(influence: Influence, name: str) -> dict[str, Any]:
    """The columns of one tensor that every method with a `u` fills in."""
    return {
        "damping": influence.lambda_[name],
        "mean_retain_sq_norm": influence.mean_retain_sq_norm[name],
        "forget_norm": influence.forget_norm[name],
        "predicted_forget_gain": influence.gain[name],
        "note": influence.notes.get(name, ""),
    }


def from_update(job: Job, influence: Influence) -> Scores:
    """Scores by the size of `u`, its damage or its trade-off, for whatever the settings rank."""
    config = job.config
    groups = groups_of(job.model, job.scope, config.granularity)
    element = config.granularity == "element"
    dots = None
    if config.objective != "forget":
        dots = StepDots(influence.update, len(job.retain), groups, element=element)
        if any(squared_norm(u) > 0.0 for u in influence.update.values()):
            job.passes.run("damage", "damage pass", job.capture, job.retain, dots)
    rows: list[dict[str, Any]] = []
    saved: dict[str, Tensor] = {}
    for info in job.scope:
        name, group = info.name, groups.get(info.name)
        # Sharded ones are gathered one at a time.
        v, u, columns = (
            whole(influence.forget_mean[name]),
            whole(influence.update[name]),
            influence_columns(influence, name),
        )
        mean, mean_square = (None, None) if dots is None else (whole(one) for one in dots.moments(name))
        if config.save_update or config.granularity != "tensor":
            keep(job, saved, name, u)
        if config.granularity == "head" and group is None:
            continue
        reached = v != 0 if element else sizes(v, group, "l2") > 0
        idle = ~reached & (u == 0 if element else sizes(u, group, "l2") == 0)
        # Without curvature (2) has no finite u, and no step along v costs the retain set anything.
        free = influence.lambda_[name] == 0.0
        gain = torch.where(reached, float("inf"), 0.0).double() if free else gains(v, u, group, element)
        damage = None if dots is None else 0.5 * mean_square
        if config.objective == "forget":
            score = gain if free else u.abs().double() if element else sizes(u, group, config.effective_score)
        elif config.objective == "retain":
            score = damage.reshape(idle.shape)
        elif free:
            score = torch.where(reached, 0.0, float("inf")).double()
        else:
            score = retain_changes(gain, mean, mean_square)
        if element:
            if config.objective != "forget":
                score = torch.where(idle, float("inf"), score)  # an edit of nothing does no damage, and is no use
            if config.objective != "forget" or free:
                keep(job, saved, f"scores/{name}", score.float())
            summed = (score if config.objective == "forget" else score[score.isfinite()]).sum()
            total = None if damage is None else damage.sum()[None]
            rows += unit_rows(info, None, summed[None], None, total, columns)
        else:
            rows += unit_rows(info, group, score.reshape(-1), gain, damage, columns, idle if group else None)
    return Scores.of(influence, rows, saved)


def keep(job: Job, saved: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Keeps what the run folder is to hold of a tensor; of a sharded model in the process that writes it, on the CPU.

    Args:
        job: whose run it is.
        saved: where to, by name.
        name: of the entry.
        values: as all processes have them, whole.
    """
    if not job.config.shard:
        saved[name] = values
    elif job.passes.processes.first:
        saved[name] = values.cpu()


def unit_rows(
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
        row = ranked_row(info, value, **columns)
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


def from_weights(job: Job, signed: Callable[[str], Tensor], columns: Callable[[str], dict[str, Any]]) -> Scores:
    """Scores summed from one signed number a weight, whose absolute value is the weight's score."""
    config, rows, saved = job.config, [], {}
    groups = groups_of(job.model, job.scope, config.granularity)
    for info in job.scope:
        group = groups.get(info.name)
        if config.granularity == "head" and group is None:
            continue
        weights = whole(signed(info.name))
        magnitude = weights.abs()
        score = magnitude.sum(dtype=torch.float64)[None] if group is None else group.sum_entries(magnitude)
        rows += unit_rows(info, group, score, None, None, columns(info.name))
        if config.granularity != "tensor":
            keep(job, saved, info.name, weights)
    return Scores(rows, saved)


def mean_columns(v: dict[str, Tensor], r: dict[str, Tensor] | None = None) -> Callable[[str], dict[str, Any]]:
    """The columns of methods that know mean gradients alone, by tensor."""

    def columns(name: str) -> dict[str, Any]:
        norm = math.sqrt(squared_norm(v[name]))
        unused = norm == 0.0 and (r is None or not any_entry(r[name]))
        return {"forget_norm": norm, "note": "unused" if unused else ""}

    return columns
