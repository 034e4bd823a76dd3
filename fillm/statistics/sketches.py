"""Sketches of the gradients of a data set, in memory, and their exact squared norms."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fillm.capture import PerSampleGradients, SketchMap
from fillm.statistics.accumulators import first_not_finite


class GradientSketches:
    """`S g_i` and `q_i = |g_i|^2` of every sample and tensor, rows by position in the sample set, on the CPU.

    A sample that no gradient of a tensor reaches has zeros. docs/method.md section 5: norms are exact, sketches are for
    inner products between different gradients.

    Args:
        maps: of every tensor in scope.
        count: number of samples `n`.
        dtype: that sketches are kept in; they are rounded to it once.
    """

    def __init__(self, maps: Mapping[str, SketchMap], count: int, dtype: torch.dtype = torch.float32) -> None:
        self.maps = dict(maps)
        self.q = {name: torch.zeros(count, dtype=torch.float64) for name in self.maps}
        self._sketches = {name: torch.zeros(count, to.dim, dtype=dtype) for name, to in self.maps.items()}

    def sketches(self, name: str) -> Tensor:
        """The sketches of one tensor's gradients, [n, dim]."""
        return self._sketches[name]

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Records a batch."""
        to, where = self.maps[name], positions.cpu()
        sketches = gradients.sketches(to)
        q = sketches.double().square().sum(1) if to.kind == "exact" else gradients.squared_norms()
        self.q[name][where] = q.cpu()
        self._sketches[name][where] = sketches.to("cpu", self._sketches[name].dtype)

    def first_not_finite(self, positions: Sequence[int]) -> tuple[str, int] | None:
        """The first tensor and sample among `positions` with a NaN or infinite gradient."""
        return first_not_finite(positions, self.q)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        norms = {f"q/{name}": q for name, q in self.q.items()}
        return norms | {f"sketch/{name}": rows for name, rows in self._sketches.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        for name in self.maps:
            self.q[name].copy_(state[f"q/{name}"])
            self._sketches[name].copy_(state[f"sketch/{name}"])
