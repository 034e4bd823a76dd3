"""Does the model's dtype carry its gradients? Two samples are computed again in float32 and compared."""

import copy
import math

import torch
from torch import nn

from fillm.capture import Capture, PerSampleGradients
from fillm.data import SampleSet, collate
from fillm.rank.console import Console

LARGEST_DIFFERENCE = 0.05
ROOM = 0.9  # of what is free on a device: two samples' activations come on top


def relative_difference(capture: Capture, samples: SampleSet, layout: str = "right") -> float:
    """`|g - g32| / |g32|` over all tensors in scope and two samples, `g32` being the gradient of a float32 copy.

    Memory: a float32 copy of the model, on its device if that has room and else in CPU memory; the layer inputs and
    output gradients of two samples, one tensor's gradient.
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), i))
    chosen = sorted({order[0], order[len(order) // 2]})
    low: dict[tuple[str, int], PerSampleGradients] = {}  # by the first of the samples they are of
    capture.run(collate(samples, chosen, layout), samples, lambda name, g, at: low.setdefault((name, int(at[0])), g))
    wide = float32_copy(capture.model, place_of_copy(capture.model))
    reference = capture.like(list(capture.parameters), wide)
    squares = torch.zeros(2, dtype=torch.float64)

    def compare(name: str, gradients: PerSampleGradients, positions: torch.Tensor) -> None:
        lossy = low.get((name, int(positions[0])))
        if lossy is None:
            return
        for row in range(len(positions)):
            rounded = lossy.materialise(row).double()
            exact = gradients.materialise(row).double().to(rounded.device)
            squares[0] += (rounded - exact).square().sum().cpu()
            squares[1] += exact.square().sum().cpu()

    reference.run(collate(samples, chosen, layout), samples, compare)
    return math.sqrt(float(squares[0] / squares[1])) if squares[1] > 0 else 0.0


def place_of_copy(model: nn.Module) -> torch.device:
    """The model's own device, or the CPU where that has no room for 4 bytes a weight."""
    device = next(model.parameters()).device
    needed = 4 * sum(p.numel() for p in model.parameters() if p.is_floating_point())
    packed = any(not p.is_floating_point() for p in model.parameters())  # which only their own device unpacks
    if device.type == "cuda" and not packed and needed > ROOM * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def float32_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy with floating-point weights and buffers in float32 on `device`, made without one in its own type."""
    made: dict[int, object] = {}
    for parameter in filter(torch.is_floating_point, model.parameters()):
        values = parameter.detach().to(device, torch.float32, copy=True)
        made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
        made[id(buffer)] = buffer.detach().to(device, dtype, copy=True)
    return copy.deepcopy(model, made)


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
