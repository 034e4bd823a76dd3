"""Which samples a step sees: a function of the seed and the step alone, so that a resumed run sees what it would have.

The forget set is gone through epoch by epoch in the batches of `fillm.finetune.schedule.epoch_batches`. Beside every
step's forget samples stand as many retain samples, taken in turn from an endless row of permutations of the retain set.
"""

import random
from collections.abc import Sequence
from functools import lru_cache

from fillm.finetune.schedule import epoch_batches


def steps_per_epoch(num_forget: int, samples_per_step: int) -> int:
    """Steps in which every forget sample is seen once."""
    return -(-num_forget // samples_per_step)


class StepSamples:
    """Positions of the samples of every step.

    Args:
        lengths: tokens of each forget sample.
        num_retain: size of the retain set.
        samples_per_step: of each set; the last step of an epoch may have fewer forget samples.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], num_retain: int, samples_per_step: int, seed: int) -> None:
        self._lengths, self._num_retain, self._per_step, self._seed = lengths, num_retain, samples_per_step, seed
        self._epoch, self._batches = -1, [[0]]  # those of the epoch that was asked for last

    def forget(self, step: int) -> list[int]:
        """Of the forget samples of a step, numbered from 0."""
        epoch, position = divmod(step, steps_per_epoch(len(self._lengths), self._per_step))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, epoch_batches(self._lengths, self._per_step, self._seed, epoch)
        return self._batches[position]

    def retain(self, step: int) -> list[int]:
        """Of the retain samples of a step: as many in every step, whatever the size of the set."""
        begin, count = step * self._per_step, self._num_retain
        rounds = range(begin // count, (begin + self._per_step - 1) // count + 1)
        row = [position for number in rounds for position in _permutation(count, self._seed, number)]
        offset = begin - rounds[0] * count
        return row[offset : offset + self._per_step]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, number: int) -> list[int]:
    # random() is stable over Python versions, shuffle() is not promised to be
    draw = random.Random(f"{seed}:retain:{number}")
    keys = [draw.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)
