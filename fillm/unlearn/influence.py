"""The closed-form step `theta - eta u` inside a mask, and what it should do: docs/method.md (2), (8) and (12).

With `s_i = <g_i, u>` summed over all tensors of the mask, so that cross-tensor terms count, and `H` the Hessian of a
set's mean loss:

    change of a set's loss = -eta * mean_i(s_i) + (eta^2 / 2) * u^T H u
    by (8) of the retain set, with its Fisher matrix for H: -eta * mean_i(s_i) + (eta^2 / 2) * mean_i(s_i^2)
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fillm.capture import Capture, PerSampleGradients, verify
from fillm.data import SampleSet
from fillm.errors import UsageError
from fillm.masks import Mask
from fillm.rank.passes import Passes
from fillm.unlearn.compact import gather, zero_outside_
from fillm.unlearn.config import ONE_SHOT_RISE
from fillm.unlearn.curvature import CurvatureAlong, SummedCurvature
from fillm.unlearn.selected import SelectedEntries

_ROUNDING = 1 + 1e-9  # so that the longest step that is not doubtful is not


@dataclass(frozen=True)
class Expansion:
    """A set's mean loss along the step, to second order, in nats a token.

    Attributes:
        slope: its rise per unit of `eta`, `-mean_i(s_i)`.
        curvature: `u^T H u`.
        fisher: `mean_i(s_i^2)`, which (8) takes for it.
    """

    slope: float
    curvature: float
    fisher: float

    def first_order(self, eta: float) -> float:
        """Change without its second-order part."""
        return eta * self.slope

    def by_fisher(self, eta: float) -> float:
        """Change by (8): right where the model does not know the rows."""
        return eta * self.slope + 0.5 * eta**2 * self.fisher

    def predicted(self, eta: float) -> float:
        """Change to second order."""
        return eta * self.slope + 0.5 * eta**2 * self.curvature

    def doubtful(self, eta: float) -> bool:
        """Whether the second-order part is the larger one: then the third may well count too."""
        return 0.5 * eta**2 * abs(self.curvature) > _ROUNDING * abs(eta * self.slope)

    def edge(self) -> float:
        """The longest step that is not doubtful; infinite without curvature."""
        return math.inf if self.curvature == 0 else 2 * abs(self.slope / self.curvature)

    def step_to(self, rise: float) -> float | None:
        """The smallest positive `eta` with this predicted rise (positive), None if there is none."""
        square = self.slope**2 + 2 * self.curvature * rise
        root = self.slope + math.sqrt(square) if square >= 0 else 0.0
        return 2 * rise / root if root > 0 else None


@dataclass(frozen=True)
class OneShot:
    """What a step is predicted to do.

    Attributes:
        eta: its length.
        forget, retain: the means of both sets along it.
        curvature_by: how `u^T H u` was had, in words; not two backward passes only where the model has no second one.
    """

    eta: float
    forget: Expansion
    retain: Expansion
    curvature_by: str


class SummedDots:
    """`s_i = sum over tensors of <g_i, u>` of every sample, [count] float64.

    Args:
        update: `u` by tensor.
        count: number of samples.
    """

    def __init__(self, update: Mapping[str, Tensor], count: int) -> None:
        self.update, self.dots = update, torch.zeros(count, dtype=torch.float64)

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Adds a batch of one tensor."""
        self.dots[positions.cpu()] += gradients.dots(self.update[name]).double().cpu()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"dots": self.dots}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        self.dots.copy_(state["dots"])


def masked_update(model: nn.Module, mask: Mask, updates: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """`u` of the mask's tensors where their weights lie, zero outside the mask.

    Raises:
        UsageError: a ranking without `u`, or without that of a tensor of the mask in its shape.
    """
    if updates is None:
        raise UsageError("--loss influence: the ranking holds no u; rank again with --save-update")
    parameters = dict(model.named_parameters())
    update: dict[str, Tensor] = {}
    for name, entry in mask.items():
        if name not in updates:
            raise UsageError(
                f"--loss influence: the ranking holds no u of {name}, which the mask selects from; rank it too, or "
                "select without it"
            )
        weight = parameters[name]
        if updates[name].shape != weight.shape:
            shapes = f"{list(updates[name].shape)}, here it has {list(weight.shape)}"
            raise UsageError(f"--loss influence: u of {name} has the shape {shapes}; the ranking is of another model")
        update[name] = updates[name].to(weight.device, torch.promote_types(weight.dtype, torch.float32)).clone()
        zero_outside_(update[name], entry.selection(weight.device))
    return update


def predicted(
    model: nn.Module,
    update: Mapping[str, Tensor],
    forget: SampleSet,
    retain: SampleSet,
    eta: float | None,
    passes: Passes,
) -> OneShot:
    """Two passes over each set: one for `s_i`, one for `u^T H u`.

    Args:
        model: before the step.
        update: `u`, zero outside the mask.
        forget: samples whose losses are predicted.
        retain: the same.
        eta: length of the step; None takes the smallest with a predicted forget rise of `ONE_SHOT_RISE`, or the longest
            whose forget prediction is not doubtful, if that is shorter.
        passes: runs them, dealt out to its processes.

    Raises:
        UsageError: the processes do not compute the same; no `eta` is given, and none is predicted to raise the forget
            loss that far.
    """
    sets = {"forget": forget, "retain": retain}
    capture = Capture(model, list(update))
    verify(capture, SampleSet([*forget, *retain], "both sets"))
    along = CurvatureAlong.tried(model, update, list(sets.values()), capture.alone)
    passes.processes.agree(json.dumps([along.step, capture.alone, sorted(capture.fallback)]))
    found = {}
    for which, samples in sets.items():
        dots, curvature = SummedDots(update, len(samples)), SummedCurvature()
        passes.run(f"dots-{which}", f"{which} pass along u", capture, samples, dots)
        passes.run(f"curvature-{which}", f"{which} curvature pass along u", along, samples, curvature)
        s = dots.dots
        found[which] = Expansion(
            -float(s.mean()), float(curvature.total) / len(samples), fisher=float(s.square().mean())
        )
    eta = _default_step(found["forget"], passes.console.note) if eta is None else eta
    return OneShot(eta, found["forget"], found["retain"], along.how)


def _default_step(forget: Expansion, note: Callable[[str], None]) -> float:
    if forget.slope <= 0:
        raise UsageError(
            f"--loss influence: no step along u raises the forget loss (gain {forget.slope:.3g}); rank with the rows "
            "that are to be forgotten, or give --eta"
        )
    eta = forget.step_to(ONE_SHOT_RISE)
    if eta is None:
        top = -forget.slope / forget.curvature
        raise UsageError(
            f"--loss influence: to second order no step along u raises the forget loss by {ONE_SHOT_RISE}; it is "
            f"highest at --eta {top:.3g}, by {forget.predicted(top):.3g}; give --eta"
        )
    edge = forget.edge()
    if edge < eta:
        note(
            f"eta is {edge:.3g}, for a predicted forget rise of {forget.predicted(edge):.2g}: at {eta:.3g}, for "
            f"{ONE_SHOT_RISE}, curvature would outweigh the slope, and the prediction be doubtful; --eta goes further"
        )
    return min(eta, edge)


def take_step(entries: SelectedEntries, update: Mapping[str, Tensor], mask: Mask, eta: float) -> None:
    """`theta <- theta - eta u` on the selected entries, computed in float64 and rounded once."""
    along = {name: gather(u, mask[name].selection(u.device)).cpu() for name, u in update.items()}
    entries.put({name: value.double() - eta * along[name].double() for name, value in entries.take().items()})
