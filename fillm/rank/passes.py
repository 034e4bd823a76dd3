"""One pass over a data set: batches, progress, checkpoints, memory that runs out, numbers that are not finite."""

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fillm.capture import PerSampleGradients, ShardedCapture
from fillm.data import Batch, SampleSet, collate, plan_batches
from fillm.errors import InterruptedRun, NumericsError, OutOfMemoryError
from fillm.models import spoilt_weight
from fillm.models.sharded_tensors import is_sharded
from fillm.rank.console import Console
from fillm.rank.dealing import Dealing
from fillm.rank.dealt_store import DealtSketches
from fillm.runs import RunFolder, signals_noted
from fillm.runs.memory import is_out_of_memory
from fillm.runs.processes import Processes


class Statistic(Protocol):
    """What a pass feeds."""

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Takes one batch of one tensor."""
        ...

    def state(self) -> dict[str, Tensor] | None:
        """What a resumed run needs; None where that is too much to be saved, and an interrupted pass starts anew."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        ...


@runtime_checkable
class StoredStatistic(Protocol):
    """What a pass feeds and leaves to keep its own state, such as `fillm.statistics.StoredSketches`."""

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Takes one batch of one tensor."""
        ...

    def resume_point(self, batches: Sequence[Sequence[int]]) -> tuple[int, Tensor, dict[str, str]]:
        """Number of batches done, losses of all samples (0 for those not done), and what there was no rule for."""
        ...

    def end_of_batch(self, positions: Sequence[int], losses: Tensor, fallback: Mapping[str, str]) -> None:
        """Takes note that all tensors of a batch have been observed."""
        ...

    def close(self) -> None:
        """The pass is over."""
        ...


class BatchRunner(Protocol):
    """What a pass hands its batches to: a `Capture`, or what computes other numbers of a batch's samples."""

    model: nn.Module
    fallback: dict[str, str]

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""
        ...

    def run(self, batch: Batch, samples: SampleSet, observe: Callable[[str, Any, Tensor], None]) -> Tensor:
        """Feeds `observe(name, numbers, positions)` one batch; [B] losses, float64, on the CPU."""
        ...


@dataclass
class Passes:
    """Runs passes under one policy.

    Attributes:
        layout: of the batches.
        tokens_per_batch: budget, padding included.
        folder: where states are saved; None in the Python API.
        checkpoint_seconds: at most this much work is lost.
        processes: that the batches are dealt out to; the first alone has the folder.
        shuffle_seed: order of the samples within batches, for tests of invariance.
        record: a row per pass for `run.yaml`.
        losses: per stage, every sample's loss.
    """

    console: Console
    layout: str = "right"
    tokens_per_batch: int | None = None
    folder: RunFolder | None = None
    checkpoint_seconds: float = 120.0
    processes: Processes = field(default_factory=lambda: Processes(alone=True))
    shuffle_seed: int | None = None
    record: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    _interrupted: Callable[[], str | None] = lambda: None
    _limit: int | None = None  # samples a batch, once memory has run out
    _group: tuple[int, int] | None = None  # of layers: which, of how many

    def run(
        self,
        stage: str,
        label: str,
        capture: BatchRunner,
        samples: SampleSet,
        statistic: Statistic | StoredStatistic,
        positions: Sequence[int] | None = None,
    ) -> None:
        """Feeds `statistic` every sample (or those at `positions`) once; continues where an interrupted run stopped."""
        row: dict[str, Any] = {"pass": stage}
        if self._group is not None:
            row["group"] = self._group[0]
            stage, label = f"{stage}-{self._group[0]}", f"{label}, group {self._group[0]} of {self._group[1]}"
        chosen = list(range(len(samples))) if positions is None else list(positions)
        lengths = [len(samples[i].input_ids) for i in chosen]
        plan = self.batches(samples, chosen)
        sizes = [(len(members), sum(lengths[i] for i in members)) for members in plan]
        row |= {"samples": len(chosen), "tokens": sum(lengths), "batches": len(plan)}
        stored = statistic if isinstance(statistic, StoredStatistic) else None
        # What keeps its own state would only be held twice, and from two moments.
        folder = self.folder if stored is None else None
        losses = torch.zeros(len(samples), dtype=torch.float64)
        start, before, tensors = 0, 0.0, {}
        in_step = isinstance(capture, ShardedCapture)
        finished = folder.load_stage(stage) if folder else None
        saved = folder.load_state() if folder and finished is None else None
        if finished is not None:
            tensors, meta = finished
        elif saved is not None and saved[0] == stage:
            _, start, tensors, meta = saved
            before = meta["seconds"]
        if finished is not None or start:
            capture.fallback |= meta.pop("fallback")  # what was met before has to go on as it began
            losses = tensors.pop("losses")
            if not in_step:  # a sharded one is loaded by all together
                statistic.load(tensors)
        if stored is not None:
            visited = [[chosen[i] for i in members] for members in plan]
            start, losses, fallback = stored.resume_point(visited)
            capture.fallback |= fallback
        # A pass too short to be saved is run again on the way to a later one's state, which must not be lost to it.
        saves = folder is not None and (saved is None or saved[0] == stage) and statistic.state() is not None
        dealt_store = statistic if isinstance(statistic, DealtSketches) else None
        dealing = Dealing(self.processes, statistic, in_step, every_round=dealt_store is not None)
        known, start, saves = dealing.open(
            [stage, chosen, plan], finished is not None, start, saves, capture.fallback, tensors
        )
        if known:
            dealing.close(losses, {})
            self._finish({**row, **(meta if finished is not None else {})}, losses)
            return
        begun = last_save = time.monotonic()
        self.processes.in_step = in_step
        with self.console.progress(label, len(chosen)) as bar:
            bar.skip(sum(size for size, _ in sizes[:start]))
            error: Exception | None = None
            for own, cursor in dealing.rounds(start, len(plan)):
                if own is None and in_step:
                    self._in_step(capture.idle, samples, statistic.observe)
                if own is not None and error is None:
                    batch = [chosen[i] for i in plan[own]]
                    try:
                        losses[batch] = self._batch(capture, samples, batch, statistic)
                        if stored is not None:
                            stored.end_of_batch(batch, losses[batch], capture.fallback)
                        bar.advance(*sizes[own], loss=float(losses[batch].mean()))
                    except Exception as caught:  # raised where the processes meet
                        if self.processes.ended:
                            raise
                        error = caught
                if not dealing.due(done=cursor == len(plan)):
                    continue
                now = time.monotonic()
                due = now - last_save >= self.checkpoint_seconds and cursor < len(plan)
                stopped, due = dealing.meet(error, self._interrupted(), due, bar, sizes)
                if dealt_store is not None:
                    dealt_store.end_of_round(dealing.turn, visited)
                if saves and (due or stopped):
                    state = dealing.copied_state(losses)
                    if folder is not None:
                        folder.save_state(
                            stage, cursor, state, {"seconds": before + now - begun, "fallback": capture.fallback}
                        )
                    last_save = now
                if stopped:
                    self.processes.end(InterruptedRun(f"stopped by {stopped} in the {label}; continue with --resume"))
        self.processes.in_step = False
        if stored is not None:
            stored.close()
        heard = dealing.close(losses, {"fallback": capture.fallback, "peak_memory_bytes": peak_memory(capture.device)})
        for said in heard:
            capture.fallback |= said["fallback"]
        seconds = round(before + time.monotonic() - begun, 3)
        measured = {"seconds": seconds, "peak_memory_bytes": max(said["peak_memory_bytes"] for said in heard)}
        keeps = folder is not None and saves and seconds >= self.checkpoint_seconds
        if in_step and saves and self.processes.meet(int(keeps))[0][0]:
            state = dealing.copied_state(losses)  # the first process's: of what is not sharded all have the sum by now
            state |= {name: t for name, t in statistic.state().items() if not is_sharded(t)} | {"losses": losses}
        elif keeps:
            state = {"losses": losses, **statistic.state()}
        if keeps:
            folder.save_stage(stage, state, {**measured, "fallback": capture.fallback})
        self._finish({**row, **measured}, losses)

    def batches(self, samples: SampleSet, positions: Sequence[int] | None = None) -> list[list[int]]:
        """The batches of a pass over the samples at `positions`, or all; by the place of a sample among these."""
        chosen = range(len(samples)) if positions is None else positions
        lengths = [len(samples[i].input_ids) for i in chosen]
        plan = plan_batches(lengths, self.tokens_per_batch, shuffle_seed=self.shuffle_seed)
        if self.shuffle_seed is None:
            # Most logits first: what the first batch finds room for, the others find too.
            counted = [samples[i].num_counted for i in chosen]
            plan.sort(key=lambda members: -sum(counted[i] for i in members))
        return plan

    def _finish(self, row: dict[str, Any], losses: Tensor) -> None:
        if self._group is None or self._group[0] == 1:
            self.losses[row["pass"]] = losses
        self.record.append(row)

    @contextmanager
    def within_group(self, number: int, count: int) -> Iterator[None]:
        """The passes meanwhile are those of one group of layers, and their states are its own."""
        self._group = (number, count)
        try:
            yield
        finally:
            self._group = None

    def _batch(
        self, capture: BatchRunner, samples: SampleSet, batch: list[int], statistic: Statistic | StoredStatistic
    ) -> Tensor:
        """One batch, in halves if memory runs out; a tensor that has already been fed is not fed twice."""
        done: dict[str, set[int]] = {}
        accumulating = False

        def observe(name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
            nonlocal accumulating
            # Parts of a retried batch are parts of what failed: their samples have all been fed, or none.
            fed, these = done.setdefault(name, set()), positions.tolist()
            if these and these[0] in fed:
                return
            accumulating = True
            statistic.observe(name, gradients, positions)
            accumulating = False
            fed.update(these)

        in_step = isinstance(capture, ShardedCapture)
        runs = partial(self._in_step, capture.run) if in_step else capture.run
        parts = [batch] if self._limit is None else _split(batch, self._limit)
        while True:
            try:
                losses = torch.cat([runs(collate(samples, part, self.layout), samples, observe) for part in parts])
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                size = max(len(part) for part in parts)
                longest = max(len(samples[i].input_ids) for i in batch)
                if size == 1 or accumulating:
                    raise OutOfMemoryError(
                        f"out of memory with {size} sample(s) of up to {longest} tokens; give --max-length below "
                        f"{longest}, --tokens-per-batch below {size * longest}, --gradient-checkpointing, or --include"
                    ) from None
            self._limit = max(1, size // 2)
            self.console.once("halved", f"out of memory: batches are halved to at most {self._limit} sample(s)")
            parts = _split(batch, self._limit)
            if capture.device.type == "cuda":
                torch.cuda.empty_cache()
        if not bool(losses.isfinite().all()) and not getattr(statistic, "any_loss", False):
            row = int((~losses.isfinite()).nonzero()[0, 0])
            named = f"the loss of sample {samples[batch[row]].id} is {float(losses[row])}"
            spoilt = spoilt_weight(capture.model)
            cause = f": {spoilt} holds NaN or infinity; give a model whose weights are finite" if spoilt else ""
            raise NumericsError(named + cause)
        check = getattr(statistic, "first_not_finite", None)
        if check is not None and (found := check(batch)) is not None:
            name, position = found
            raise NumericsError(f"the gradient of sample {samples[position].id} with respect to {name} is not finite")
        return losses

    def _in_step(self, part: Callable[..., Any], *given: Any) -> Any:
        """What all processes go through together: an error in the midst of it ends them at once.

        Batches are not halved where memory runs out: the others would wait for the second half.
        """
        try:
            return part(*given)
        except Exception as error:
            if not is_out_of_memory(error):
                self.processes.abandon(error)
            self.processes.abandon(
                OutOfMemoryError(
                    "out of memory: a sharded model's batches are not halved; give --tokens-per-batch, --max-length or "
                    "--gradient-checkpointing"
                )
            )

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the batch in hand, with its state saved; a second one at once.

        Without a folder there is nothing to save and nothing to resume: they act as they do in any program. Of several
        processes the first may have one.
        """
        if self.folder is None and self.processes.count == 1:
            yield
            return
        with signals_noted() as self._interrupted:
            yield


def _split(batch: list[int], size: int) -> list[list[int]]:
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's own peak resident size on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # Not getrusage: its figure starts from the parent's at the time of the fork.
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
