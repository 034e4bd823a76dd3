"""What a person at a terminal sees, and what a log file gets: results on stdout, progress and warnings on stderr."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from fillm.statistics import relative_width

if TYPE_CHECKING:
    from rich.progress import Progress as LiveProgress
    from rich.progress import TaskID

    from fillm.rank.ranking import Ranking

_LOG = logging.getLogger("fillm")
_LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
_LEFT_ALIGNED = ("name", "kind", "note")


class Progress(Protocol):
    """What is told of every batch; a `Bar` is one."""

    def advance(self, samples: int, tokens: int, loss: float | None = None) -> None:
        """Counts a batch: its samples, its tokens, and its mean loss to be shown."""


class Bar:
    """The progress of one pass."""

    def __init__(
        self, console: "Console", label: str, total: int, live: "LiveProgress | None", task: "TaskID | None"
    ) -> None:
        self._console, self._label, self._total, self._live, self._task = console, label, total, live, task
        self._begun = self._last_line = console.clock()
        self._done = self._samples = self._tokens = 0

    def advance(self, samples: int, tokens: int, loss: float | None = None) -> None:
        """Counts a batch.

        Args:
            samples: in it.
            tokens: in it.
            loss: its mean loss, in nat per answer token, to be shown.
        """
        self._samples += samples
        self._tokens += tokens
        self._step(samples, loss)

    def skip(self, samples: int) -> None:
        """Counts samples that an earlier run has done: they move the bar, but not the rates."""
        self._step(samples, None)

    def _step(self, samples: int, loss: float | None) -> None:
        self._done += samples
        note = "" if loss is None else f"loss {loss:.4g}"
        if self._live is not None:
            self._live.update(self._task, completed=self._done, rates=self._rates(), note=note)
            return
        now = self._console.clock()
        if now - self._last_line < _LINE_SECONDS or self._done >= self._total:
            return
        self._last_line = now
        seconds = now - self._begun
        left = seconds * (self._total - self._done) / self._samples if self._samples else float("inf")
        times = f"{seconds:.0f} s, {left:.0f} s left" if left < float("inf") else f"{seconds:.0f} s"
        parts = [f"{self._done} of {self._total} samples", self._rates(), times, note]
        self._console.note(f"{self._label}: " + ", ".join(part for part in parts if part))

    def _rates(self) -> str:
        seconds = self._console.clock() - self._begun
        if seconds <= 0.0 or not self._samples:
            return ""
        return f"{_rate(self._samples / seconds)} samples/s, {_rate(self._tokens / seconds)} tokens/s"

    def summary(self) -> str:
        """`retain pass: 360 samples in 7.3 s, 49.3 samples/s, 3050 tokens/s`; time and rates are of this run's own."""
        earlier = self._done - self._samples
        samples = f"{self._done} samples" if not earlier else f"{self._samples} of {self._done} samples"
        line = f"{self._label}: {samples} in {self._console.clock() - self._begun:.1f} s"
        done = f"{earlier} were done before" if earlier else ""
        return ", ".join(part for part in (line, self._rates(), done) if part)


class Console:
    """Two streams and what goes where.

    Args:
        stdout: for results; None for the process's own at the time of writing.
        stderr: for progress, notes and warnings; likewise.
        clock: seconds, monotonic.
        quiet: print nothing; notes go to the logger `fillm` as information, warnings as warnings.
    """

    def __init__(
        self,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ) -> None:
        self._stdout, self._stderr, self.clock, self.quiet = stdout, stderr, clock, quiet
        self._said: set[str] = set()
        self._live: LiveProgress | None = None

    @classmethod
    def silent(cls) -> "Console":
        """For the Python API: nothing printed, warnings logged."""
        return cls(quiet=True)

    @property
    def stdout(self) -> TextIO:
        """Where results go."""
        return self._stdout or sys.stdout

    @property
    def stderr(self) -> TextIO:
        """Where progress, notes and warnings go."""
        return self._stderr or sys.stderr

    def say(self, message: str) -> None:
        """A result, as a line on stdout."""
        if not self.quiet:
            print(message, file=self.stdout, flush=True)

    def note(self, message: str) -> None:
        """Something worth knowing, as a line on stderr."""
        if self.quiet:
            _LOG.info(message)
        elif self._live is not None:  # above the moving bar, not through it
            self._live.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Something that should not be missed, as a line on stderr."""
        if self.quiet:
            _LOG.warning(message)
        else:
            self.note(f"warning: {message}")

    def once(self, key: str, message: str) -> None:
        """Warns the first time that `key` is met."""
        if key not in self._said:
            self._said.add(key)
            self.warn(message)

    @contextmanager
    def progress(self, label: str, total_samples: int) -> Iterator[Bar]:
        """A bar with rates, elapsed time and time left on a terminal, elsewhere a line now and then; then a summary."""
        if self.quiet:
            yield Bar(self, label, total_samples, None, None)
            return
        if not self.stderr.isatty():
            self.note(f"{label}: {total_samples} samples")
            bar = Bar(self, label, total_samples, None, None)
            yield bar
        else:
            with _live_progress(self.stderr, self.clock) as live:
                task = live.add_task(label, total=total_samples, rates="", note="")
                bar = Bar(self, label, total_samples, live, task)
                self._live = live
                try:
                    yield bar
                finally:
                    self._live = None
        self.note(bar.summary())

    def top_table(self, ranking: "Ranking", rows: int = 20) -> None:
        """The head of a ranking: scores to 5 digits, and how far apart their bounds are."""
        if self.quiet:
            return
        header, lines = table_cells(ranking, rows)
        title = f"top {len(lines)} of {len(ranking)}: {ranking.method}, objective {ranking.objective}"
        if not self.stdout.isatty():
            self.say("\n".join([title, *_aligned(header, lines)]))
            return
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for name in header:
            if name in _LEFT_ALIGNED:
                table.add_column(name, overflow="fold")
            else:
                table.add_column(name, justify="right", no_wrap=True)
        for line in lines:
            table.add_row(*(Text(cell) for cell in line))
        RichConsole(file=self.stdout).print(table)


def table_cells(ranking: "Ranking", rows: int) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the first `rows` entries, as text."""
    columns = ["rank", "name", *(["index"] if "index" in ranking.table.column_names else []), "kind", "layer", "numel"]
    header = [*columns, "score", "bracket %", "note"]
    lines = []
    for row in ranking.table.slice(0, rows).to_pylist():
        cells = ["-" if name == "layer" and row[name] < 0 else str(row[name]) for name in columns]
        width = relative_width(row["score_low"], row["score_high"])
        lines.append([*cells, f"{row['score']:#.5g}", "exact" if width == 0.0 else f"{100.0 * width:.2g}", row["note"]])
    return header, lines


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    out = []
    for line in [header, *lines]:
        cells = zip(header, line, widths, strict=True)
        padded = [cell.ljust(width) if name in _LEFT_ALIGNED else cell.rjust(width) for name, cell, width in cells]
        out.append("  ".join(padded).rstrip())
    return out


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 1000.0 else f"{value:.0f}"


def _live_progress(stream: TextIO, clock: Callable[[], float]) -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=RichConsole(file=stream),
        get_time=clock,
        transient=True,
    )
