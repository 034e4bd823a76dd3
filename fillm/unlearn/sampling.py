"""Which samples a step sees: a function of the seed and the step alone, so that a resumed run sees what it would have.

The forget set is gone through epoch by epoch in the batches of `fillm.finetune.schedule.epoch_batches`. Beside every
step's forget samples stand as many retain samples, taken in turn from an endless row of permutations of the retain set.
"""

import random
from collections.abc import Sequence

from fillm.finetune.schedule import epoch_batches


def steps_per_epoch(num_forget: int, samples_per_step: int) -> int:
    """Steps in which every forget sample is seen once."""
    return -(-num_forget // samples_per_step)


def forget_positions(lengths: Sequence[int], samples_per_step: int, seed: int, step: int) -> list[int]:
    """Positions of the forget samples of a step.

    Args:
        lengths: tokens of each forget sample.
        samples_per_step: the last step of an epoch may have fewer.
        seed: of the run.
        step: number of the step, from 0.
    """
    epoch, position = divmod(step, steps_per_epoch(len(lengths), samples_per_step))
    return epoch_batches(lengths, samples_per_step, seed, epoch)[position]


def retain_positions(count: int, samples_per_step: int, seed: int, step: int) -> list[int]:
    """Positions of the retain samples of a step: `samples_per_step` of them, whatever the size of the set.

    Args:
        count: size of the retain set.
        samples_per_step: as of the forget set.
        seed: of the run.
        step: number of the step, from 0.
    """
    begin = step * samples_per_step
    rounds = range(begin // count, (begin + samples_per_step - 1) // count + 1)
    row = [position for number in rounds for position in _permutation(count, seed, number)]
    offset = begin - rounds[0] * count
    return row[offset : offset + samples_per_step]


def _permutation(count: int, seed: int, number: int) -> list[int]:
    # random() is stable over Python versions, shuffle() is not promised to be
    draw = random.Random(f"{seed}:retain:{number}")
    keys = [draw.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)
