"""The closed-form step `theta - eta u` inside a mask, and what it should do: docs/method.md (2) and (8).

With `s_i = <g_i, u>` summed over all tensors of the mask, so that cross-tensor terms count:

    forget change = eta * gain,    gain = -mean_j <f_j, u>
    retain change = -eta * mean_i(s_i) + (eta^2 / 2) * mean_i(s_i^2)
"""

from collections.abc import Mapping
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
from fillm.unlearn.selected import SelectedEntries


@dataclass(frozen=True)
class OneShot:
    """What a step is predicted to do, in nats a token.

    Attributes:
        eta: its length.
        gain: rise of the forget loss per unit of `eta`.
        forget_change, retain_change: by (8), means over the samples of the passes.
    """

    eta: float
    gain: float
    forget_change: float
    retain_change: float


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
    """One pass over each set.

    Args:
        model: before the step.
        update: `u`, zero outside the mask.
        forget: samples whose losses are predicted.
        retain: the same.
        eta: length of the step; None takes the one with a predicted forget rise of `ONE_SHOT_RISE`.
        passes: runs them.

    Raises:
        UsageError: no `eta` is given, and no positive one raises the forget loss.
    """
    capture = Capture(model, list(update))
    verify(capture, SampleSet([*forget, *retain], "both sets"))
    dots = {}
    for which, samples in (("forget", forget), ("retain", retain)):
        statistic = SummedDots(update, len(samples))
        passes.run(f"dots-{which}", f"{which} pass along u", capture, samples, statistic)
        dots[which] = statistic.dots
    gain = -float(dots["forget"].mean())
    if eta is None:
        if gain <= 0:
            raise UsageError(
                f"--loss influence: no step along u raises the forget loss (gain {gain:.3g}); rank with the rows that "
                "are to be forgotten, or give --eta"
            )
        eta = ONE_SHOT_RISE / gain
    s = dots["retain"]
    change = -eta * float(s.mean()) + 0.5 * eta**2 * float(s.square().mean())
    return OneShot(eta, gain, eta * gain, change)


def take_step(entries: SelectedEntries, update: Mapping[str, Tensor], mask: Mask, eta: float) -> None:
    """`theta <- theta - eta u` on the selected entries, computed in float64 and rounded once."""
    along = {name: gather(u, mask[name].selection(u.device)).cpu() for name, u in update.items()}
    entries.put({name: value.double() - eta * along[name].double() for name, value in entries.take().items()})
