"""Per-sample gradients of a tensor whose accumulators lie spread over the processes.

Each process has the gradients of its own samples and its own rows of every accumulator. A dot with `v` gathers `v` for
as long as it takes; a weighted sum is formed for the own samples, and every process receives what all have summed for
its rows. So whatever takes an accumulator is asked by all processes together, also by one that has no samples.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fillm.capture.gradients import PerSampleGradients, norms_and_dots, row_layout
from fillm.capture.sketching import SketchMap
from fillm.models.sharded_tensors import add_up_into_shards, local, whole


class ShardedGradients:
    """The gradients that one process has of one tensor.

    Args:
        own: of its samples; None where it has none, or no gradient of them reaches the tensor.
        parameter: the tensor as the model holds it.
    """

    def __init__(self, own: PerSampleGradients | None, parameter: Tensor) -> None:
        self.own, self.shape, self._device = own, parameter.shape, local(parameter).device

    def _none(self) -> Tensor:
        return torch.zeros(0, dtype=torch.float64, device=self._device)

    def squared_norms(self) -> Tensor:
        """Of the own samples, without the other processes."""
        return self._none() if self.own is None else self.own.squared_norms()

    def dots(self, v: Tensor) -> Tensor:
        """With `v` gathered, by all together."""
        gathered = whole(v)
        return self._none() if self.own is None else self.own.dots(gathered)

    def norms_and_dots(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both, with `v` gathered once, by all together."""
        gathered = whole(v)
        return (self._none(), self._none()) if self.own is None else norms_and_dots(self.own, gathered)

    def add_weighted_(self, out: DTensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """Adds what all processes have, each to its rows of `out`; by all together."""
        self._add_together(out, lambda own, part: own.add_weighted_(part, weights, alpha))

    def add_powers_(self, out: DTensor, power: int, alpha: float = 1.0) -> None:
        """The same for powers; by all together."""
        self._add_together(out, lambda own, part: own.add_powers_(part, power, alpha))

    def _add_together(self, out: DTensor, add: Callable[[PerSampleGradients, Tensor], None]) -> None:
        part = torch.zeros(self.shape, dtype=out.dtype, device=self._device)
        if self.own is not None:
            add(self.own, part)
        add_up_into_shards(out, part)

    def materialise(self, sample: int) -> Tensor:
        """Of an own sample, whole."""
        if self.own is None:
            raise IndexError("this process has no samples")
        return self.own.materialise(sample)

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """Of every row or column, with `u` gathered, by all together."""
        gathered = whole(u)
        if self.own is None:
            return torch.zeros(0, row_layout(self.shape)[axis], dtype=torch.float64, device=self._device)
        return self.own.axis_dots(gathered, axis)

    def sketches(self, to: SketchMap) -> NoReturn:
        """Not of sharded tensors: settings that need it are refused beforehand."""
        raise NotImplementedError("sharded tensors are not sketched")

    def leading_rows(self, begin: int, end: int) -> NoReturn:
        """Not of sharded tensors: settings that need it are refused beforehand."""
        raise NotImplementedError("rows of sharded tensors are not handed out")

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "ShardedGradients":
        """Of what is held."""
        raise NotImplementedError("sharded gradients are not kept")


def is_shared(gradients: PerSampleGradients) -> bool:
    """Whether all processes ask the same of these gradients at the same time, so that none may leave a question out."""
    return isinstance(gradients, ShardedGradients)
