"""Batches that are cut in half when memory runs out."""

from collections.abc import Callable, Sequence

import torch

from fillm.errors import OutOfMemoryError
from fillm.runs.memory import is_out_of_memory


class Halving:
    """Runs batches in parts that fit; what did not fit once is not tried again.

    Args:
        notice: told, in a line, when the parts become smaller.
    """

    def __init__(self, notice: Callable[[str], None] | None = None) -> None:
        self._notice = notice
        self._limit: int | None = None

    def run(self, batch: Sequence[int], work: Callable[[list[int]], None], tokens: Callable[[int], int]) -> None:
        """Has every position of a batch worked on.

        Args:
            batch: positions of samples.
            work: takes some of them; starts again from nothing where it was cut short.
            tokens: of the sample at a position, for the message.

        Raises:
            OutOfMemoryError: not even one sample fits.
        """
        waiting = list(batch)
        while waiting:
            part = waiting[: self._limit]
            try:
                work(part)
                waiting = waiting[len(part) :]
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if len(part) == 1:
                raise OutOfMemoryError(
                    f"out of memory with one sample of {tokens(part[0])} tokens; give --max-length below "
                    f"{tokens(part[0])}, or --dtype bfloat16"
                )
            self._limit = len(part) // 2
            if self._notice is not None:
                self._notice(f"out of memory: batches are halved to at most {self._limit} sample(s)")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
