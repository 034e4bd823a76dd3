"""Per-sample gradients on a device whose accumulators lie in CPU memory (`--offload`).

What the statistics hand in and get back lies in CPU memory. A tensor that is dotted with is copied to the device for as
long as that takes; an accumulator is copied there, added to and copied back, so that it has the bits that it would have
on the device. Copies are queued on the current stream behind the work before them, so that they follow one another as
the questions do; whoever reads an accumulator on the CPU waits for the stream first (`Capture.run` does).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fillm.capture.gradients import PerSampleGradients, norms_and_dots
from fillm.capture.sketching import SketchMap

Observe = Callable[[str, Any, Tensor], None]


class OffloadedGradients:
    """Gradients that answer in CPU memory.

    Args:
        own: where they were found.
        device: where that is.
    """

    def __init__(self, own: PerSampleGradients, device: torch.device) -> None:
        self.own, self.shape, self._device = own, own.shape, device

    def _there(self, tensor: Tensor) -> Tensor:
        """A copy on the device, on the CPU as well: what is added to it reaches the original by copying alone."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device).copy_(tensor, non_blocking=True)

    def squared_norms(self) -> Tensor:
        """[B], float64."""
        return self.own.squared_norms().cpu()

    def dots(self, v: Tensor) -> Tensor:
        """[B], float64."""
        return self.own.dots(self._there(v)).cpu()

    def norms_and_dots(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both, with `v` copied once."""
        squares, dots = norms_and_dots(self.own, self._there(v))
        return squares.cpu(), dots.cpu()

    def add_weighted_(self, out: Tensor, weights: Tensor | None, alpha: float = 1.0) -> None:
        """Two copies of `out`."""
        there = None if weights is None else weights.to(self._device)
        self._add(out, lambda sums: self.own.add_weighted_(sums, there, alpha))

    def add_powers_(self, out: Tensor, power: int, alpha: float = 1.0) -> None:
        """Two copies of `out`."""
        self._add(out, lambda sums: self.own.add_powers_(sums, power, alpha))

    def _add(self, out: Tensor, add: Callable[[Tensor], None]) -> None:
        sums = self._there(out)
        add(sums)
        out.copy_(sums, non_blocking=True)

    def axis_dots(self, u: Tensor, axis: int) -> Tensor:
        """[B, rows] or [B, columns], float64."""
        return self.own.axis_dots(self._there(u), axis).cpu()

    def sketches(self, to: SketchMap) -> Tensor:
        """[B, dim]."""
        return self.own.sketches(to).cpu()

    def materialise(self, sample: int) -> Tensor:
        """Copied whole."""
        return self.own.materialise(sample).cpu()

    def leading_rows(self, begin: int, end: int) -> Tensor:
        """[B, end - begin, columns]."""
        return self.own.leading_rows(begin, end).cpu()

    def with_factors(self, change: Callable[[Tensor], Tensor]) -> "OffloadedGradients":
        """Of what is held on the device."""
        return OffloadedGradients(self.own.with_factors(change), self._device)


def offloading(observe: Observe, device: torch.device) -> Observe:
    """Hands on gradients that answer in CPU memory."""

    def observe_offloaded(name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        observe(name, OffloadedGradients(gradients, device), positions)

    return observe_offloaded


def finish_copies(device: torch.device) -> None:
    """Waits until what was copied from a device is there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
