"""Before a run relies on the rules: are they this model's gradient?

Two samples of different lengths go through the rules in one batch and through plain autograd one by one. A tensor whose
gradients differ, because the model uses it in a way nobody foresaw, takes the exact batch-1 fallback; the run names it.
Where the losses differ the samples see each other: the capture then runs every batch sample by sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fillm.capture.engine import Capture, frozen
from fillm.capture.gradients import PerSampleGradients
from fillm.capture.losses import sample_losses
from fillm.capture.noise import noise_floors
from fillm.capture.rules import unit_roundoff
from fillm.data import Batch, SampleSet, collate
from fillm.errors import UsageError

# Largest |g - g_autograd| / |g_autograd| that rounding explains, as a multiple of the unit roundoff of the dtype: some
# tens of layers each add a few roundings, and a batch of two sums in another order than a batch of one.
ROUNDINGS = 2.0**13
# In half precision that bound would pass anything; the rounding seen there stays under a tenth.
LARGEST_TOLERANCE = 0.25
NOISE = 1e-9  # of the largest tensor's gradient; float32 rounds at 6e-8

Kept = dict[tuple[str, int], Callable[[], Tensor]]  # the dense gradient of a tensor and a sample, by its position


@dataclass
class Verification:
    """What the check found."""

    error: dict[str, float] = field(default_factory=dict)  # per tensor, relative difference to autograd
    unreached: set[str] = field(default_factory=set)  # no gradient of either sample reaches the tensor


def verify(capture: Capture, samples: SampleSet, layout: str = "right") -> Verification:
    """Compares rules and autograd on two samples; sends tensors that differ to `capture.fallback`.

    Sets `capture.alone` where what differs is right once the samples do not share a batch.

    Memory: the layer inputs and output gradients of two samples, and one tensor's gradient at a time.
    """
    before = dict(capture.fallback)
    found, differing, apart = _check(capture, samples, layout)
    if not capture.alone and (apart or differing):
        single = capture.like(list(capture.parameters))
        if apart:  # an operation may have no rule in a batch, and one where the only sample owns every row
            single.fallback = before
        first = next(iter(differing), "")
        single.alone = apart or f"{first}: {differing[first]} in a {layout} batch of two samples, and not one by one"
        again, differing_alone, _ = _check(single, samples, layout)
        if apart or set(differing) - set(differing_alone):
            capture.alone, found, differing = single.alone, again, differing_alone
            capture.fallback = single.fallback if apart else capture.fallback | single.fallback
    capture.fallback |= differing
    return found


def _check(capture: Capture, samples: SampleSet, layout: str) -> tuple[Verification, dict[str, str], str]:
    """What was found, the tensors that differ and how, and, where losses differ, what shows that samples mix."""
    chosen = two_lengths(samples)
    kept: Kept = {}

    def keep(name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        for row, position in enumerate(positions.tolist()):
            kept[name, position] = partial(gradients.materialise, row)

    together = capture.run(collate(samples, chosen, layout), samples, keep)
    found, differing, apart = Verification(unreached=set(capture.parameters)), {}, ""
    tolerance = min(ROUNDINGS * unit_roundoff(next(iter(capture.parameters.values())).dtype), LARGEST_TOLERANCE)
    squares: dict[str, Tensor] = {}
    names = [name for name in capture.parameters if name not in capture.fallback and name not in capture.noise]
    for row, position in enumerate(chosen):
        batch = collate(samples, [position]).to(capture.device)
        alone = _compare(capture, names, batch, kept, position, squares, found.unreached)
        if math.isfinite(alone) and not abs(alone - float(together[row])) <= tolerance * max(1.0, abs(alone)):
            apart = _not_apart(samples[position].id, alone, float(together[row]), layout)
            if capture.alone:  # not even then is the loss the model's own
                differing |= dict.fromkeys(names, apart)
    found.unreached -= {*capture.fallback, *capture.noise}
    for name in {name for name, _ in kept} & set(names) - set(squares):
        if any(bool(kept[name, position]().any()) for position in chosen if (name, position) in kept):
            differing[name] = "rules find a gradient where autograd has none"
    # Below this a gradient is the noise of other tensors' rounding: two ways of computing it need not agree.
    noise = (NOISE**2) * max((float(reference) for _, reference in squares.values()), default=0.0)
    for name, (difference, reference) in squares.items():
        if max(float(difference), float(reference)) < noise:
            found.error[name] = 0.0
            continue
        found.error[name] = float((difference / reference).sqrt()) if difference > 0 else 0.0
        if not found.error[name] <= tolerance:
            differing.setdefault(name, f"rules differ from autograd by {found.error[name]:.1e}")
    sizes = {name: max(float(difference), float(reference)) ** 0.5 for name, (difference, reference) in squares.items()}
    floors = noise_floors(capture, samples, chosen, sizes, differing)
    capture.noise |= floors
    for name in floors:
        differing.pop(name, None)
        found.error[name] = 0.0
    return found, differing, apart


def two_lengths(samples: SampleSet) -> list[int]:
    """The shortest sample and a longer one, a quarter up if there is one: padding and a neighbour for both."""
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), i))
    later = order[max(1, len(order) // 4) :]
    longer = [i for i in later if len(samples[i].input_ids) > len(samples[order[0]].input_ids)]
    return sorted({order[0], *(longer or later)[:1]})


def _compare(
    capture: Capture,
    names: list[str],
    batch: Batch,
    kept: Kept,
    position: int,
    squares: dict[str, Tensor],
    unreached: set[str],
) -> float:
    """Accumulates |g - g_autograd|^2 and |g_autograd|^2 per tensor, strikes out what is reached; the sample's loss."""

    def check(name: str, parameter: Tensor) -> None:
        reference = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.grad = None
        unreached.discard(name)
        rule = kept.get((name, position))
        captured = torch.zeros_like(reference) if rule is None else rule().to(reference.dtype)
        # Norms before squares: small gradients of large models would underflow float32.
        lengths = [torch.linalg.vector_norm(captured - reference), torch.linalg.vector_norm(reference)]
        entry = torch.stack(lengths).double().square()
        if rule is not None and not captured.any() and _is_noise(capture, reference):
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
                if loss.requires_grad:  # not where every tensor in scope takes the fallback
                    loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for name, gradient in before.items():
                capture.parameters[name].grad = gradient
    return float(loss.detach())


def _not_apart(sample: str, alone: float, together: float, layout: str) -> str:
    """Says what shows that samples see each other; refuses layouts whose alternative may keep them apart."""
    what = f"sample {sample} has loss {alone:.6g} alone and {together:.6g} in a {layout} batch"
    if layout != "right":
        raise UsageError(f"--layout {layout}: {what}: this model does not keep samples apart there; use --layout right")
    return what


def _is_noise(capture: Capture, gradient: Tensor) -> bool:
    """Whether a gradient is below 2^10 rounding errors of a unit-sized sum per entry."""
    eps = unit_roundoff(next(iter(capture.parameters.values())).dtype)
    return float(gradient.abs().max()) < 1024 * eps
