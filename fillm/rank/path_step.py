"""The step that the path ranking follows, (13) of method.md: weights moved along the sign of the forget gradient."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fillm.capture import Capture, frozen, sample_losses
from fillm.data import Batch, SampleSet, collate

FIRST_LENGTH = 1e-3  # of those tried, a change of every weight
DOUBLINGS, HALVINGS = 12, 5
MOST_LENGTHS = 1 + DOUBLINGS + HALVINGS


class SignStep:
    """Adam's first step, the sign of a gradient (Kingma and Ba, arXiv 1412.6980): moves weights along it, and back.

    Memory: a byte and a copy of every weight.

    Args:
        parameters: the weights that are moved, by name.
        gradient: of each, of its shape.

    Attributes:
        signs: -1, 0 or 1 of every weight, int8.
    """

    def __init__(self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self.signs = {name: gradient[name].sign().to(torch.int8) for name in self._parameters}
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @contextmanager
    def at(self, length: float) -> Iterator[None]:
        """With the weights at `theta + length * sign`; they come back bit by bit, whatever happens."""
        try:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.add_(self.signs[name].to(parameter.dtype), alpha=length)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(self._before[name])


def find_length(risen: Callable[[float], float], rise: float) -> float | None:
    """The length of a step that brings a loss up by `rise`, at most 1/32 longer than it has to be.

    Args:
        risen: how much the loss has risen at a length.
        rise: how much it shall.

    Returns:
        The length: doubled from `FIRST_LENGTH` until it is enough, or halved while it is, then halved in between. None
        if the longest that is tried is not enough; where the shortest is more than enough, about that one.
    """
    high = FIRST_LENGTH
    if risen(high) >= rise:
        low = high / 2.0
        for _ in range(DOUBLINGS - 1):
            if risen(low) < rise:
                break
            high, low = low, low / 2.0
    else:
        for _ in range(DOUBLINGS):
            low, high = high, 2.0 * high
            if risen(high) >= rise:
                break
        else:
            return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if risen(middle) >= rise else (middle, high)
    return high


class ForwardLosses:
    """What a pass hands its batches to where losses are all that is asked for: forward passes alone.

    Args:
        capture: whose model, loss and knowledge of the model it takes.
    """

    def __init__(self, capture: Capture) -> None:
        self.model, self.fallback, self._capture = capture.model, capture.fallback, capture

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""
        return self._capture.device

    def run(self, batch: Batch, samples: SampleSet, observe: Callable[[str, Any, Tensor], None]) -> Tensor:
        """[B] losses, float64, on the CPU; nothing is observed."""
        parts = [batch]
        if self._capture.alone and len(batch.indices) > 1:
            parts = [collate(samples, [position], batch.layout) for position in batch.indices.tolist()]
        with frozen(self.model), torch.no_grad():
            losses = [sample_losses(self.model, one.to(self.device), self._capture.loss_reduction) for one in parts]
        return torch.cat(losses).double().cpu()


class LossesAlone:
    """The statistic of a pass whose losses are all that is asked for.

    Args:
        any_loss: take also infinite ones and NaN, which end other passes.
    """

    def __init__(self, any_loss: bool = False) -> None:
        self.any_loss = any_loss

    def observe(self, name: str, gradients: Any, positions: Tensor) -> None:
        """Takes nothing."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the losses, which the pass keeps."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to continue from."""
