"""Tensors whose gradient is nothing but rounding noise, told from those whose gradient is small.

A query that can attend to one token alone has gradient zero in real arithmetic. What backpropagation leaves there
differs from way to way of computing it, and divided by its own square it would rank first. Float64 decides: what is a
gradient stays, what is noise all but vanishes.
"""

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from fillm.capture.engine import Capture, batch_one_gradients, frozen
from fillm.capture.rules import unit_roundoff
from fillm.data import SampleSet, collate

# Noise is some roundings of the gradients that cancelled, and these are no larger than the largest tensor's: float32
# models of random weights leave up to 3. Half precision would make every tensor suspect, hence the bound.
SUSPECT_ROUNDINGS, LARGEST_SUSPECT = 128.0, 1.0 / 64.0
# A gradient is known to about the noise beside it. One that float64 makes 64 times as small was known to no digit.
VANISHED = 1.0 / 64.0
MOST_PARAMETERS = 1 << 28  # of which a float64 copy is made: 2 GiB


def suspects(dtype: torch.dtype, sizes: Mapping[str, float]) -> list[str]:
    """The tensors whose gradient, of norm `sizes[name]`, may be noise beside the largest."""
    limit = min(SUSPECT_ROUNDINGS * unit_roundoff(dtype), LARGEST_SUSPECT) * max(sizes.values(), default=0.0)
    return [name for name, size in sizes.items() if size < limit]


def noise_floors(
    capture: Capture,
    samples: SampleSet,
    chosen: Sequence[int],
    sizes: Mapping[str, float],
    differing: Collection[str],
) -> dict[str, float]:
    """For every tensor that is noise, the norm up to which a sample's gradient of it says nothing.

    Where no float64 copy can be had, a suspect is noise if two ways of computing it agree in no digit.

    Args:
        capture: of the model.
        samples: the set.
        chosen: positions of the samples that were compared.
        sizes: by tensor, the norm over these samples of the larger of its two gradients.
        differing: tensors whose two gradients disagree.

    Returns:
        Floors: 64 times the noise that was seen, and no less than half a rounding of the largest gradient, because
        noise that happens to be zero in two samples need not be in the next. Real gradients below are known to 2 %.
    """
    dtype = next(iter(capture.parameters.values())).dtype
    names = suspects(dtype, sizes)
    if not names:
        return {}
    exact = _float64_sizes(capture, samples, chosen, names)
    if exact is None:
        noise = [name for name in names if name in differing]
    else:
        noise = [name for name in names if exact.get(name, 0.0) <= VANISHED * sizes[name]]
    least = 0.5 * unit_roundoff(torch.float32) * max(sizes.values())
    return {name: max(sizes[name] / VANISHED, least) for name in noise}


def _float64_sizes(
    capture: Capture, samples: SampleSet, chosen: Sequence[int], names: list[str]
) -> dict[str, float] | None:
    """Norms over the chosen samples of the gradients in float64; None where the model cannot be had in it."""
    if sum(p.numel() for p in capture.model.parameters()) > MOST_PARAMETERS:
        return None
    squares = dict.fromkeys(names, 0.0)
    try:
        twin: nn.Module = copy.deepcopy(capture.model).double()
        with frozen(twin):
            for position in chosen:
                batch = collate(samples, [position]).to(capture.device)
                for name, gradient in batch_one_gradients(twin, names, batch, capture.loss_reduction):
                    squares[name] += float(gradient.square().sum())
    except RuntimeError:  # no memory for it, or operations that know no float64
        return None
    return {name: square**0.5 for name, square in squares.items()}
