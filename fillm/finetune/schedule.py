"""Which samples a step sees and how large its learning rate is, each a function of the seed and the step alone.

Nothing here has a state, so a run that is continued at some step does what the uninterrupted run did.
"""

import math
import random
from collections.abc import Sequence

from fillm.errors import UsageError

_STEPS_PER_GROUP = 16


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of the warm-up: `warmup` itself, or that fraction of `total` if it is below 1; fewer than `total`.

    Raises:
        UsageError: a number of steps that the run would not get beyond.
    """
    if warmup < 1:
        return min(round(warmup * total), max(0, total - 1))
    if round(warmup) >= total:
        raise UsageError(f"--warmup {warmup:g}: the run has no more than {total} steps; give fewer, or a fraction")
    return round(warmup)


def rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """The learning rate of a step as a fraction of its peak.

    Rises linearly over `warmup` steps, then falls to 0 after the last step: along a half cosine, or linearly.

    Args:
        step: number of the step, from 0.
        total: number of steps.
        warmup: steps before the peak, below `total`.
        schedule: `cosine` or `linear`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    fraction = (step - warmup) / (total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * fraction)) if schedule == "cosine" else 1.0 - fraction


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All samples in a random order, cut into batches of samples of similar length.

    The order is random over groups of 16 batches; inside a group samples are sorted by length and cut, which leaves
    little padding while other samples meet in every epoch.

    Args:
        lengths: tokens of each sample.
        batch_size: samples a batch; the last may have fewer.
        seed: of the run.
        epoch: number of the epoch, from 0.

    Returns:
        ceil(len(lengths) / batch_size) batches of positions, every position once.
    """
    draw = random.Random(f"{seed}:{epoch}")
    keys = [draw.random() for _ in lengths]  # random() is stable over Python versions, shuffle() is not promised to be
    order = sorted(range(len(lengths)), key=keys.__getitem__)
    group = batch_size * _STEPS_PER_GROUP
    batches = []
    for start in range(0, len(order), group):
        alike = sorted(order[start : start + group], key=lambda i: (lengths[i], keys[i]))
        batches += [alike[first : first + batch_size] for first in range(0, len(alike), batch_size)]
    return sorted(batches, key=lambda batch: keys[batch[0]])
