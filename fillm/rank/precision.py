"""Does the model's dtype carry its gradients? Two samples are computed again in float32 and compared."""

import copy
import math

import torch
from torch import nn

from fillm.capture import Capture, PerSampleGradients
from fillm.data import SampleSet, collate
from fillm.rank.console import Console

LARGEST_DIFFERENCE = 0.05


def relative_difference(capture: Capture, samples: SampleSet, layout: str = "right") -> float:
    """`|g - g32| / |g32|` over all tensors in scope and two samples, `g32` being the gradient of a float32 copy.

    Memory: a float32 copy of the model, the layer inputs and output gradients of two samples, one tensor's gradient.
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), i))
    chosen = sorted({order[0], order[len(order) // 2]})
    low: dict[tuple[str, int], PerSampleGradients] = {}  # by the first of the samples they are of
    capture.run(collate(samples, chosen, layout), samples, lambda name, g, at: low.setdefault((name, int(at[0])), g))
    wide: nn.Module = copy.deepcopy(capture.model).float()
    reference = capture.like(list(capture.parameters), wide)
    squares = torch.zeros(2, dtype=torch.float64)

    def compare(name: str, gradients: PerSampleGradients, positions: torch.Tensor) -> None:
        lossy = low.get((name, int(positions[0])))
        if lossy is None:
            return
        for row in range(len(positions)):
            exact = gradients.materialise(row).double()
            squares[0] += (lossy.materialise(row).double() - exact).square().sum().cpu()
            squares[1] += exact.square().sum().cpu()

    reference.run(collate(samples, chosen, layout), samples, compare)
    return math.sqrt(float(squares[0] / squares[1])) if squares[1] > 0 else 0.0


def warn_of_noise(capture: Capture, samples: SampleSet, console: Console, layout: str = "right") -> float | None:
    """Warns, with the figure, when low-precision gradients are off by more than 5 %; None for float32 and wider."""
    # Of the whole model: float32 adapters around a bfloat16 model see its noise.
    dtypes = {p.dtype for p in capture.model.parameters() if p.is_floating_point()}
    dtype = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    if torch.finfo(dtype).bits >= 32:
        return None
    difference = relative_difference(capture, samples, layout)
    if not difference <= LARGEST_DIFFERENCE:
        console.warn(
            f"gradients in {str(dtype).removeprefix('torch.')} differ from float32 by {100 * difference:.1f} % "
            f"on the first samples; scores carry that noise: use --dtype float32 if it fits"
        )
    return difference
