"""Before a run relies on the rules: are they this model's gradient?

Two samples of different lengths go through the rules in one batch and through plain autograd one by one. A tensor whose
gradients differ, because the model uses it in a way nobody foresaw, takes the exact batch-1 fallback; the run names it.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fillm.capture.engine import Capture, frozen
from fillm.capture.gradients import PerSampleGradients
from fillm.capture.losses import sample_losses
from fillm.capture.rules import unit_roundoff
from fillm.data import Batch, SampleSet, collate
from fillm.errors import UsageError

# Largest |g - g_autograd| / |g_autograd| that rounding explains, as a multiple of the unit roundoff of the dtype: some
# tens of layers each add a few roundings, and a batch of two sums in another order than a batch of one.
ROUNDINGS = 2.0**13
# In half precision that bound would pass anything; the rounding seen there stays under a tenth.
LARGEST_TOLERANCE = 0.25
NOISE = 1e-9  # of the largest tensor's gradient; float32 rounds at 6e-8


@dataclass
class Verification:
    """What the check found."""

    error: dict[str, float] = field(default_factory=dict)  # per tensor, relative difference to autograd
    unreached: set[str] = field(default_factory=set)  # no gradient of either sample reaches the tensor


def verify(capture: Capture, samples: SampleSet, layout: str = "right") -> Verification:
    """Compares rules and autograd on two samples; sends tensors that differ to `capture.fallback`.

    Memory: the layer inputs and output gradients of two samples, and one tensor's gradient at a time.
    """
    chosen = _two_lengths(samples)
    kept: dict[str, PerSampleGradients] = {}
    together = capture.run(collate(samples, chosen, layout), samples, lambda name, g, _: kept.__setitem__(name, g))
    found = Verification(unreached=set(capture.parameters))
    tolerance = min(ROUNDINGS * unit_roundoff(next(iter(capture.parameters.values())).dtype), LARGEST_TOLERANCE)
    squares: dict[str, Tensor] = {}
    names = [name for name in capture.parameters if name not in capture.fallback]
    for row, position in enumerate(chosen):
        batch = collate(samples, [position]).to(capture.device)
        alone = _compare(capture, names, batch, kept, row, squares, found.unreached)
        if math.isfinite(alone) and not abs(alone - float(together[row])) <= tolerance * max(1.0, abs(alone)):
            _refuse_batches(capture, samples[position].id, alone, float(together[row]), layout)
    found.unreached -= set(capture.fallback)
    for name in set(kept) - set(squares) - set(capture.fallback):
        if any(bool(kept[name].materialise(row).any()) for row in range(len(chosen))):
            capture.fallback[name] = "rules find a gradient where autograd has none"
    # Below this a gradient is the noise of other tensors' rounding: two ways of computing it need not agree.
    noise = (NOISE**2) * max((float(reference) for _, reference in squares.values()), default=0.0)
    for name, (difference, reference) in squares.items():
        if max(float(difference), float(reference)) < noise:
            found.error[name] = 0.0
            continue
        found.error[name] = float((difference / reference).sqrt()) if difference > 0 else 0.0
        if not found.error[name] <= tolerance:
            capture.fallback[name] = f"rules differ from autograd by {found.error[name]:.1e}"
    return found


def _two_lengths(samples: SampleSet) -> list[int]:
    """The shortest sample and a longer one, a quarter up if there is one: padding and a neighbour for both."""
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), i))
    later = order[max(1, len(order) // 4) :]
    longer = [i for i in later if len(samples[i].input_ids) > len(samples[order[0]].input_ids)]
    return sorted({order[0], *(longer or later)[:1]})


def _compare(
    capture: Capture,
    names: list[str],
    batch: Batch,
    kept: dict[str, PerSampleGradients],
    row: int,
    squares: dict[str, Tensor],
    unreached: set[str],
) -> float:
    """Accumulates |g - g_autograd|^2 and |g_autograd|^2 per tensor, strikes out what is reached; the sample's loss."""

    def check(name: str, parameter: Tensor) -> None:
        reference = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.grad = None
        unreached.discard(name)
        captured = kept[name].materialise(row).to(reference.dtype) if name in kept else torch.zeros_like(reference)
        # Norms before squares: small gradients of large models would underflow float32.
        lengths = [torch.linalg.vector_norm(captured - reference), torch.linalg.vector_norm(reference)]
        entry = torch.stack(lengths).double().square()
        if name in kept and not captured.any() and _is_noise(capture, reference):
            entry[0] = 0.0  # a rule saw it and found nothing but the rounding noise of a sum that cancels
        squares[name] = squares.get(name, torch.zeros_like(entry)) + entry

    with frozen(capture.model):
        handles = []
        before = {name: capture.parameters[name].grad for name in names}
        for name in names:
            parameter = capture.parameters[name]
            parameter.grad = None
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: check(name, p)))
        try:
            with torch.enable_grad():
                loss = sample_losses(capture.model, batch, capture.loss_reduction).sum()
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for name, gradient in before.items():
                capture.parameters[name].grad = gradient
    return float(loss.detach())


def _refuse_batches(capture: Capture, sample: str, alone: float, together: float, layout: str) -> None:
    """A sample whose loss depends on who else is in the batch: batches of one, or another layout."""
    what = f"sample {sample} has loss {alone:.6g} alone and {together:.6g} in a {layout} batch"
    if layout != "right":
        raise UsageError(f"--layout {layout}: {what}: this model does not keep samples apart there; use --layout right")
    capture.fallback |= dict.fromkeys(capture.parameters, what)


def _is_noise(capture: Capture, gradient: Tensor) -> bool:
    """Whether a gradient is below 2^10 rounding errors of a unit-sized sum per entry."""
    eps = unit_roundoff(next(iter(capture.parameters.values())).dtype)
    return float(gradient.abs().max()) < 1024 * eps
