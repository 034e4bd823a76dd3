"""The gradient-norm attack: a row that a model was trained on pulls at its weights less than a row it never saw."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fillm.capture import Capture, PerSampleGradients, verify
from fillm.data import SampleSet
from fillm.models import catalogue, check_differentiable, select_tensors
from fillm.rank.passes import Passes


class SquaredNorms:
    """Sums the squared norms of every sample's gradient over tensors.

    Args:
        count: number of samples of the pass.
    """

    def __init__(self, count: int) -> None:
        self.total = torch.zeros(count, dtype=torch.float64)
        self._spoilt: tuple[str, int] | None = None

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Adds one batch of one tensor."""
        squares, at = gradients.squared_norms().double().cpu(), positions.cpu()
        if self._spoilt is None and not bool(squares.isfinite().all()):
            self._spoilt = name, int(at[~squares.isfinite()][0])
        self.total.index_add_(0, at, squares)

    def first_not_finite(self, positions: Sequence[int]) -> tuple[str, int] | None:
        """The tensor and sample that spoilt the sums, if any."""
        return self._spoilt

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {"total": self.total}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        self.total = state["total"]


def gradient_norms(
    model: nn.Module,
    sets: Mapping[str, SampleSet],
    passes: Passes,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """`|d loss_i / d theta|_2` of every sample's own mean loss, without forming a gradient (docs/method.md (4)).

    Source: Wang et al. 2024, arXiv 2402.17012 (there the norm of the gradient of all weights, as here).

    Args:
        model: a causal language model; left as it was.
        sets: samples by name of their set, such as `forget` and `holdout`.
        passes: how passes are run: batches, progress, memory.
        include: kinds and globs of the tensors that count, as in `fillm.rank`; None is all.
        exclude: kinds and globs of those that do not.

    Returns:
        By set, [samples] float64, in nats a token per unit of weight, in the order of the samples.

    Raises:
        ModelError: gradients cannot be had of this model.
        NumericsError: names the sample whose loss or gradient is not finite.
        UsageError: a pattern that matches no tensor.
    """
    error, found = None, {}
    try:
        check_differentiable(model)
        capture = Capture(model, [info.name for info in select_tensors(catalogue(model), include, exclude)])
        both = SampleSet([sample for samples in sets.values() for sample in samples], "all sets")
        verify(capture, both, passes.layout)
    except Exception as caught:  # raised where all processes are, so that none goes on without the others
        error = caught
    passes.processes.meet(error=error)
    for which, samples in sets.items():
        norms = SquaredNorms(len(samples))
        passes.run(f"gradient-norm-{which}", f"gradient norms, {which}", capture, samples, norms)
        found[which] = norms.total.sqrt().numpy()
    return found
