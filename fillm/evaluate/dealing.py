"""The batches of a pass, dealt out to the processes of a run, which all have what any of them found in the end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from fillm.errors import InterruptedRun
from fillm.rank.console import Progress
from fillm.rank.dealing import Dealing
from fillm.runs.processes import Processes

Item = TypeVar("Item")


@dataclass(frozen=True)
class Deal:
    """Who does what of a pass.

    Attributes:
        processes: of the run; if nothing else is said this one alone, which does everything.
        interrupted: names the signal that this process was told to stop by, None while there is none.
    """

    processes: Processes = field(default_factory=lambda: Processes(alone=True))
    interrupted: Callable[[], str | None] = lambda: None

    def run(
        self,
        label: str,
        batches: Sequence[Sequence[Item]],
        work: Callable[[Sequence[Item]], None],
        progress: Progress | None,
        tokens: Callable[[Sequence[Item]], int],
    ) -> None:
        """Has every batch worked on in one of the processes, which meet about once a second and after the last.

        Args:
            label: of the pass, for messages.
            batches: the same in all processes, however many there are.
            work: takes a batch, and tells `progress` of it.
            progress: is told here of the batches of other processes.
            tokens: of a batch.

        Raises:
            Exception: what `work` raises, once all processes have met.
            EndedByAnother: another process has an error.
            InterruptedRun: a process was told to stop.
        """
        dealing = Dealing(self.processes, None)
        sizes = [(len(batch), tokens(batch)) for batch in batches]
        error: Exception | None = None
        for own, done in dealing.rounds(0, len(batches)):
            if own is not None and error is None:
                try:
                    work(batches[own])
                except Exception as caught:  # raised where the processes meet
                    error = caught
            if dealing.due(done=done == len(batches)):
                stopped, _ = dealing.meet(error, self.interrupted(), False, progress, sizes)
                if stopped:
                    self.processes.end(InterruptedRun(f"stopped by {stopped} in {label}; continue with --resume"))

    def share(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives every process what each has of some tensors, zeros where it has nothing, in place; all are here."""
        self.processes.add_up_all(tensors.values())

    def known(self, found: bool) -> bool:
        """Whether the first process, which alone has the run's folder, has found something there; all meet."""
        return bool(self.processes.meet(int(found))[0][0])
