"""A store that several processes fill: each computes rows, and the first writes those of all in the order of the plan.

So the store has the bytes that one process would have given it, and any number of processes goes on with it.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fillm.capture import PerSampleGradients, SketchMap
from fillm.runs.processes import Processes
from fillm.statistics import OpenBatch, StoredSketches


class DealtSketches:
    """What a pass feeds in one of several processes, in the place of `StoredSketches`.

    Args:
        processes: of the run.
        maps: of the tensors in scope.
        dtype: of the stored sketches.
        count: samples of the data set.
        writer: of the first process; None in the others.
    """

    def __init__(
        self,
        processes: Processes,
        maps: Mapping[str, SketchMap],
        dtype: torch.dtype,
        count: int,
        writer: StoredSketches | None,
    ) -> None:
        self._processes, self._writer, self._count = processes, writer, count
        self._batch = OpenBatch(maps, dtype)
        # Of a sample: rows of all tensors, their squared norms, and its loss.
        self._columns = [*((to.dim, dtype) for to in maps.values()), (len(maps), torch.float64), (1, torch.float64)]
        self._own: tuple[list[Tensor], dict[str, str]] = [], {}
        self._fallback: dict[str, str] = {}

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Takes one tensor's gradients of a batch, or of a part of it."""
        self._batch.observe(name, gradients, positions)

    def first_not_finite(self, positions: Sequence[int]) -> tuple[str, int] | None:
        """The first tensor of the batch in hand with a NaN or infinite gradient, and the sample."""
        return self._batch.first_not_finite(positions)

    def resume_point(self, batches: Sequence[Sequence[int]]) -> tuple[int, Tensor, dict[str, str]]:
        """As of `StoredSketches` in the first process, which tells the others where to begin."""
        if self._writer is None:
            return 0, torch.zeros(self._count, dtype=torch.float64), {}
        begin, losses, self._fallback = self._writer.resume_point(batches)
        return begin, losses, dict(self._fallback)

    def end_of_batch(self, positions: Sequence[int], losses: Tensor, fallback: Mapping[str, str]) -> None:
        """Ends the batch of this process; it is handed over at the end of the round."""
        self._own = [*self._batch.take(positions), losses[:, None]], dict(fallback)

    def end_of_round(self, turn: Sequence[int], batches: Sequence[Sequence[int]]) -> None:
        """Hands the rows of a round to the first process, which adds them to the store; no process has failed.

        Args:
            turn: number of every process's batch; those at the end may have none.
            batches: positions of the samples of all batches.

        Raises:
            StoreError: in the first process, if the disk refuses.
        """
        index = self._processes.index
        if self._writer is None:
            if index < len(turn):
                self._processes.give(_packed(*self._own))
            return
        found = {turn[0]: self._own}
        for process, number in enumerate(turn[1:], start=1):
            found[number] = self._unpacked(self._processes.take(process), len(batches[number]))
        for number in sorted(found):
            (*parts, losses), fallback = found[number]
            self._fallback |= fallback
            self._writer.add_batch(batches[number], parts, losses[:, 0], self._fallback)

    def _unpacked(self, data: Tensor, rows: int) -> tuple[list[Tensor], dict[str, str]]:
        sizes = [rows * columns * dtype.itemsize for columns, dtype in self._columns]
        parts = []
        for (begin, end), (columns, dtype) in zip(pairwise(accumulate(sizes, initial=0)), self._columns, strict=True):
            # Copied to where a number of its size may begin.
            parts.append(data[begin:end].clone().view(dtype).view(rows, columns))
        return parts, json.loads(bytes(data[sum(sizes) :].tolist()))

    def state(self) -> dict[str, Tensor]:
        """Nothing: the store keeps its own."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing either."""

    def close(self) -> None:
        """The pass is over."""
        if self._writer is not None:
            self._writer.close()


def _packed(parts: Sequence[Tensor], fallback: Mapping[str, str]) -> Tensor:
    """Bytes of tensors one after another, and of what JSON says of the fallback."""
    words = torch.tensor(list(json.dumps(dict(fallback)).encode()), dtype=torch.uint8)
    return torch.cat([*(part.contiguous().view(-1).view(torch.uint8) for part in parts), words])
