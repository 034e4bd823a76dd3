"""What one of several devices has of a tensor, and which batches it does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fillm.rank.dealing import rounds


@dataclass(frozen=True)
class Devices:
    """The devices that a plan is for.

    Attributes:
        count: how many; the samples are dealt out to them.
        sharded: whether weights and accumulators are divided as well (`--shard`).
    """

    count: int = 1
    sharded: bool = False

    def held(self, shape: Sequence[int]) -> int:
        """Entries of a tensor that the first device holds, which has most: all, or its chunk along the first axis."""
        if not self.sharded or not shape:
            return math.prod(shape)
        return -(-shape[0] // self.count) * math.prod(shape[1:])

    def dealt(self, work: Sequence[float], led: bool) -> list[int]:
        """The batches that take a device's time, as `fillm.rank.dealing` deals them out.

        Args:
            work: of every batch, in the order of the pass.
            led: whether the first batch is a round by itself.

        Returns:
            Indices: the batches of the device with most work; where the processes go through every batch together, the
            largest of every round, which the others wait for.
        """
        turns = [list(members) for members in rounds(0, len(work), self.count, led and self.count > 1)]
        if self.sharded:
            return [max(turn, key=lambda batch: work[batch]) for turn in turns]
        own: list[list[int]] = [[] for _ in range(self.count)]
        for number, turn in enumerate(turns):
            for batches, batch in zip(own, turn if number % 2 == 0 else reversed(turn), strict=False):
                batches.append(batch)
        return max(own, key=lambda batches: sum(work[batch] for batch in batches))
