"""What a person sees of a training: a bar on a terminal, a plain line every few seconds anywhere else."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0


class TrainingProgress:
    """Shows steps, loss, samples/s and time left on stderr.

    Args:
        steps: steps of the whole training.
        done: steps taken before this process.
        shown: whether to show anything but messages.
    """

    def __init__(self, steps: int, done: int, shown: bool = True) -> None:
        self._steps, self._first, self._shown = steps, done, shown
        self._samples, self._begun, self._last_line = 0, time.monotonic(), time.monotonic()
        console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            columns = (
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.1f} samples/s"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=steps, completed=done, epoch=0, loss=float("nan"), speed=0.0)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, epoch: int, samples: int, loss: float) -> None:
        """After a step: steps taken in all, its epoch (from 1), its samples and their mean loss."""
        self._samples += samples
        now = time.monotonic()
        speed = self._samples / max(now - self._begun, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=epoch, loss=loss, speed=speed)
        elif self._shown and (now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._steps):
            self._last_line = now
            left = (now - self._begun) / (step - self._first) * (self._steps - step)
            self._print(
                f"epoch {epoch}  step {step}/{self._steps}  loss {loss:.4f}  {speed:.1f} samples/s  {left:.0f} s left"
            )

    def message(self, text: str) -> None:
        """One line that is said once, bar or not."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            self._print(text)

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
