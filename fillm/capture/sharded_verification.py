"""Are the rules a sharded model's gradient? `verify` for weights that lie spread over the processes.

Every process takes the same two samples, through the rules in one batch and through FSDP2's own autograd one by one,
and compares the rows that it holds. What differs is refused by name: the exact batch-1 fallback has no place where all
processes go through the same number of forward passes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fillm.capture.engine import frozen
from fillm.capture.gradients import PerSampleGradients
from fillm.capture.losses import sample_losses
from fillm.capture.noise import suspects
from fillm.capture.rules import unit_roundoff
from fillm.capture.sharded import ShardedCapture
from fillm.capture.verification import LARGEST_TOLERANCE, NOISE, ROUNDINGS, Verification, two_lengths
from fillm.data import SampleSet, collate
from fillm.errors import ModelError
from fillm.models.sharded_tensors import local, own_rows, sum_in_order


def verify_sharded(
    capture: ShardedCapture,
    samples: SampleSet,
    groups: Sequence[Sequence[str]],
    layout: str = "right",
) -> Verification:
    """Compares rules and autograd on two samples, in all processes together.

    Tensors whose two gradients disagree far below the largest are taken for rounding noise and noted in
    `capture.noise`; no float64 copy of a sharded model is made to tell.

    Args:
        capture: of the tensors to check.
        samples: of which two are taken.
        groups: names of the tensors that are checked at a time; together all of the capture's.
        layout: of the batch of the two.

    Memory: of a group's tensors, two samples' gradients of the rows that the process holds, float32, and one tensor's
    whole gradient.

    Raises:
        ModelError: the rules do not hold for a tensor, or samples see each other in a batch.
    """
    like = next(iter(capture.parameters.values()))
    tolerance = min(ROUNDINGS * unit_roundoff(like.dtype), LARGEST_TOLERANCE)
    rows = {name: row for row, name in enumerate(capture.parameters)}
    squares = torch.zeros(len(rows), 2, dtype=torch.float64, device=capture.device)
    reached = torch.zeros(len(rows), dtype=torch.float64, device=capture.device)
    parts = [capture.like(names) for names in groups]
    for part in parts:
        places = torch.tensor([rows[name] for name in part.parameters], device=capture.device)
        found, hit = _check_group(part, samples, layout, tolerance)
        squares[places], reached[places] = found, hit
    capture.take_order_of(parts)
    squares, reached = sum_in_order(squares, like), sum_in_order(reached, like)
    return _judged(capture, squares.tolist(), reached.tolist(), tolerance)


def _check_group(capture: ShardedCapture, samples: SampleSet, layout: str, tolerance: float) -> tuple[Tensor, Tensor]:
    """Of this process's rows of every tensor: |g - g_autograd|^2 and |g_autograd|^2, [tensors, 2]; 1 where reached."""
    chosen = two_lengths(samples)
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        parameter = capture.parameters[name]
        begin, length = own_rows(parameter), local(parameter).shape[0]
        for row, position in enumerate(positions.tolist()):
            # A copy: a view of the whole would keep the whole.
            kept[name, position] = gradients.materialise(row)[begin : begin + length].clone()

    together = capture.run(collate(samples, chosen, layout), samples, keep)
    squares = torch.zeros(len(capture.parameters), 2, dtype=torch.float64, device=capture.device)
    reached = torch.zeros(len(capture.parameters), dtype=torch.float64, device=capture.device)
    for row, position in enumerate(chosen):
        alone = _compare(capture, samples, position, kept, squares, reached)
        if math.isfinite(alone) and not abs(alone - float(together[row])) <= tolerance * max(1.0, abs(alone)):
            raise ModelError(
                f"--shard: sample {samples[position].id} has loss {alone:.6g} alone and {float(together[row]):.6g} in "
                f"a {layout} batch: its samples see each other; leave out --shard"
            )
    return squares, reached


def _compare(
    capture: ShardedCapture,
    samples: SampleSet,
    position: int,
    kept: dict[tuple[str, int], Tensor],
    squares: Tensor,
    reached: Tensor,
) -> float:
    """Adds |g - g_autograd|^2 and |g_autograd|^2 of this process's rows, [tensors, 2]; returns the sample's loss."""
    batch = collate(samples, [position]).to(capture.device)
    parameters = capture.parameters
    with frozen(capture.model):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = sample_losses(capture.model, batch, capture.loss_reduction).sum()
            if loss.requires_grad:  # not where no tensor in scope is reached
                loss.backward()
        for row, (name, parameter) in enumerate(parameters.items()):
            found = kept.pop((name, position), None)
            if parameter.grad is None:
                if found is not None:
                    squares[row, 0] += torch.linalg.vector_norm(found).double().square()
                continue
            # The mean over the processes of what is the same in all of them.
            reference = local(parameter.grad).to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.grad = None
            reached[row] = 1.0
            captured = torch.zeros_like(reference) if found is None else found.to(reference.dtype)
            if found is not None and not captured.any() and _is_noise(capture, reference):
                reference = torch.zeros_like(reference)  # nothing but the rounding noise of a sum that cancels
            lengths = [torch.linalg.vector_norm(captured - reference), torch.linalg.vector_norm(reference)]
            squares[row] += torch.stack(lengths).double().square()
    return float(loss.detach())


def _is_noise(capture: ShardedCapture, gradient: Tensor) -> bool:
    eps = unit_roundoff(next(iter(capture.parameters.values())).dtype)
    return gradient.numel() == 0 or float(gradient.abs().max()) < 1024 * eps


def _judged(
    capture: ShardedCapture, squares: list[list[float]], reached: list[float], tolerance: float
) -> Verification:
    found = Verification(unreached={name for name, hit in zip(capture.parameters, reached, strict=True) if not hit})
    sizes = {name: max(pair) ** 0.5 for name, pair in zip(capture.parameters, squares, strict=True)}
    largest = max((pair[1] for pair in squares), default=0.0) ** 0.5
    suspected = set(suspects(next(iter(capture.parameters.values())).dtype, sizes))
    for name, (difference, reference) in zip(capture.parameters, squares, strict=True):
        if max(difference, reference) < NOISE**2 * largest**2 or difference == 0.0:
            found.error[name] = 0.0
            continue
        error = (difference / reference) ** 0.5 if reference > 0 else math.inf
        if not error <= tolerance and name in suspected:
            floor = 0.5 * unit_roundoff(torch.float32) * max(sizes.values())
            capture.noise[name], error = max(64.0 * sizes[name], floor), 0.0
        if not error <= tolerance:
            raise ModelError(
                f"--shard: {name}: rules differ from autograd by {error:.1e}; give --exclude for it, or leave out "
                "--shard"
            )
        found.error[name] = error
    return found
