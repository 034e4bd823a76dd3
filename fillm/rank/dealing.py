"""A pass dealt out to several processes: which batches are whose, when they meet, and what is added up at the end.

Batches are planned from all samples, whatever the number of processes. Rounds take them in the order of the plan, one
for each process, forwards and backwards by turns, so that nobody gets the larger of two every time. So a number of
batches says what has been done, and a run may go on with another number of processes.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fillm.models.sharded_tensors import into_shards, is_sharded, whole
from fillm.rank.console import Progress
from fillm.runs.processes import Processes

MEETING_SECONDS = 1.0  # between two meetings, where a round does not take longer
_MOST_ROUNDS = 64  # between two meetings


def rounds(start: int, count: int, processes: int, led: bool) -> Iterator[range]:
    """The batches `start` to `count` in rounds of one for each process; where `led`, batch 0 is a round by itself."""
    begin = start
    while begin < count:
        end = min(count, begin + (1 if led and begin == 0 else processes))
        yield range(begin, end)
        begin = end


class Dealing:
    """One pass in one process of several; with one process, all batches are its own and there is nobody to meet.

    Args:
        processes: of the run.
        statistic: what the pass feeds. Its `state()` adds up over the processes, but for what `alike` names. If it has
            `lead` and `follow`, what the first batch fixes is taken over by all. If it has `start_from_zero`, it holds
            the sums of passes before this one, which the first process alone keeps until the end. Its sharded tensors
            are already the sums: every process has its part of them.
        in_step: the model is sharded, and the processes meet after every round.
        every_round: they do so for another reason.

    Attributes:
        turn: the batches of the round in hand, in the order of the processes that do them.
    """

    def __init__(self, processes: Processes, statistic: Any, in_step: bool = False, every_round: bool = False) -> None:
        self.processes, self._statistic, self._in_step = processes, statistic, in_step
        self._every_round, self.turn = in_step or every_round, []
        self._led = processes.count > 1 and hasattr(statistic, "lead")
        self._round = 0
        self._leads_now = False
        self._next = 1  # round after which the processes meet
        self._met, self._met_round = time.monotonic(), 0
        self._behind: list[int] = []  # batches of others since the last meeting

    def open(
        self,
        of: Sequence[Any],
        finished: bool,
        start: int,
        saves: bool,
        fallback: dict[str, str],
        saved: Mapping[str, Tensor],
    ) -> tuple[bool, int, bool]:
        """All processes begin where the first one does, which has loaded what an earlier run has saved.

        Args:
            of: what the pass is over; has to be the same in all.
            finished: whether the first process has the result from an earlier run.
            start: number of batches that were done then.
            saves: whether states are saved.
            fallback: tensors without a rule that were met before; those of the first process are added.
            saved: the state that the first process has read, which a sharded statistic has not loaded yet.

        Returns:
            `finished`, `start` and `saves` as the first process has them.

        Raises:
            UsageError: the processes are not at the same pass.
        """
        self.processes.agree(json.dumps(of))
        if not self.processes.first and not self._in_step and hasattr(self._statistic, "start_from_zero"):
            self._statistic.start_from_zero()
        finished, start, saves = self.processes.meet(int(finished), start, int(saves))[0]
        if self.processes.count > 1 and (finished or start):
            fallback |= json.loads(self.processes.tell(json.dumps(fallback))[0])
            if self._in_step:
                self._spread(saved)
            self._take_the_lead()
        return bool(finished), start, bool(saves)

    def rounds(self, start: int, count: int) -> Iterator[tuple[int | None, int]]:
        """(this process's batch, or None; number of batches done after the round), round by round."""
        self._leads_now = start == 0
        for members in rounds(start, count, self.processes.count, self._led):
            forwards = self._round % 2 == 0
            self.turn = turn = list(members if forwards else reversed(members))
            self._round += 1
            own = turn[self.processes.index] if self.processes.index < len(turn) else None
            self._behind += [batch for batch in turn if batch != own]
            yield own, members.stop

    def due(self, done: bool) -> bool:
        """Whether the processes meet after this round; they do after the last."""
        return done or self._every_round or self._round >= self._next

    def meet(
        self,
        error: BaseException | None,
        stop: str | None,
        save: bool,
        bar: Progress | None,
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[str | None, bool]:
        """Waits for the others, and agrees with them.

        Args:
            error: why this process cannot go on; it ends them all.
            stop: signal that this process was told to stop by.
            save: whether the first process finds a state due.
            bar: counts what the others have done.
            sizes: samples and tokens of every batch.

        Returns:
            The signal that any process was told to stop by, and whether a state is saved.
        """
        each = max(time.monotonic() - self._met, 1e-6) / (self._round - self._met_round)
        ahead = min(max(1, int(MEETING_SECONDS / each)), _MOST_ROUNDS) if self.processes.count > 1 else 1
        heard = self.processes.meet(int(stop is not None), int(save), ahead, error=error)
        self._next = self._round + heard[0][2]
        self._met, self._met_round = time.monotonic(), self._round
        if self._leads_now:  # at once: what fails on one side only has to fail where all look up next, at a meeting
            self._take_the_lead()
        for batch in self._behind if bar is not None else ():
            bar.advance(*sizes[batch])
        self._behind.clear()
        told = any(words[0] for words in heard)
        return (stop or "a signal to another process") if told else None, bool(heard[0][1])

    def _take_the_lead(self) -> None:
        self._leads_now = False
        if self._led:
            self._statistic.follow(self.processes.add_up_in_order(self._statistic.lead()))

    def _spread(self, saved: Mapping[str, Tensor]) -> None:
        """Loads a state that the first process has read into the statistic: of sharded tensors each gets its part.

        Args:
            saved: as `copied_state` made it; in the other processes empty.
        """
        state = self._statistic.state()
        for name, tensor in state.items():
            if is_sharded(tensor):
                into_shards(saved.get(name), tensor)
        self._statistic.load({name: t if is_sharded(t) else saved.get(name, t) for name, t in state.items()})

    def copied_state(self, losses: Tensor) -> dict[str, Tensor]:
        """The statistic's state and the losses of all processes, on the CPU of the first; empty in the others."""
        state = {"losses": losses, **self._statistic.state()}
        if self.processes.count == 1:
            return state
        copies: dict[str, Tensor] = {}
        error: Exception | None = None
        if self.processes.first:
            try:
                copies = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in state.items()}
            except (MemoryError, RuntimeError) as caught:
                error = caught
        self.processes.meet(error=error)
        for name, tensor in state.items():
            if is_sharded(tensor):
                gathered = whole(tensor)
                if self.processes.first:
                    copies[name].copy_(gathered)
            elif not self._alike(name):
                self.processes.add_up_into(copies.get(name), tensor)
            elif self.processes.first:
                copies[name].copy_(tensor)
        return copies

    def close(self, losses: Tensor, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Adds up losses and state, so that every process has the whole; what all of them say."""
        heard = [json.loads(words) for words in self.processes.tell(json.dumps(said))]
        if self.processes.count > 1:
            state = self._statistic.state() or {}  # None of what is too much to be saved, and stays where it is
            own = [t for name, t in state.items() if not self._alike(name) and not is_sharded(t)]
            self.processes.add_up_all([losses, *own])
            self._statistic.load(state)
        return heard

    def _alike(self, name: str) -> bool:
        return name.startswith(tuple(getattr(self._statistic, "alike", ())))
