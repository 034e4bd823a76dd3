"""One process or several under `torchrun`: who does what, what is added up, and who speaks and writes.

Samples are dealt out to the processes and what they say is summed over them with torch.distributed. All processes hold
the same weights. The first one alone writes and speaks; an error of any ends all of them, and one tells of it.
"""

import gc
import os
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fillm.errors import EndedByAnother, FillmError, InterruptedRun, UsageError
from fillm.models import resolve_device
from fillm.runs.memory import is_out_of_memory

Item = TypeVar("Item")
_NUMBERS = 4  # that a process may say at a meeting
_LEFT = "left at once with exit code"  # key on the board
_BLOCK = 1 << 22  # entries that are added up at a time


class Processes:
    """The processes of this run.

    Args:
        device: the option `--device`; with several processes and CUDA, each takes the device of its local rank.
        alone: this process by itself, whatever it was started by.

    Attributes:
        index, count: of this process, and how many there are.
        device: where this process computes.
        ended: whether the run ends and the others know, or are gone.
        in_step: whether the others may be in the midst of what all compute together, and not on the way to a meeting.

    Raises:
        UsageError: several processes without the package accelerate, or more than this machine has GPUs.
    """

    def __init__(self, device: str = "auto", *, alone: bool = False) -> None:
        self._state: Any = None
        self.index, self.count = 0, 1
        self.ended = False
        self.in_step = False
        self._words: Any = None  # the group in which numbers and texts go round; always on the CPU
        self._board: Any = None  # where a process that leaves at once says so
        if several_started() and not alone:
            cpu = resolve_device(device).type == "cpu"
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if not cpu and here > torch.cuda.device_count():
                raise UsageError(
                    f"{here} processes on this machine, which has {torch.cuda.device_count()} CUDA devices: give "
                    "torchrun no more than that, or --device cpu"
                )
            self._state, self._board = _joined(cpu)
            self.index, self.count = self._state.process_index, self._state.num_processes
            self.device = self._state.device
            self._words = torch.distributed.new_group(backend="gloo")
        else:
            self.device = resolve_device(device)

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """What of `items` is this process's to do."""
        return list(items[self.index :: self.count])

    def add_up_in_order(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place.

        It is taken in their order and therefore has the same bits whenever they arrive, in all of them.

        Args:
            tensor: on any device, of the same shape and type in every process; of booleans it is the union. What is
                narrower than float64 is added up in float64 and rounded once.
        """
        for block, total in self._block_sums(tensor):
            block.copy_(total)
        return tensor

    def add_up_all(self, tensors: Iterable[Tensor]) -> None:
        """`add_up_in_order` of many tensors, with the same bits: those of a type and device go round together.

        A collective takes its time however little it carries, and of most tensors a statistic has a few numbers.
        """
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors if self.count > 1 else ():
            if tensor.numel() >= _BLOCK:
                self.add_up_in_order(tensor)
                continue
            some = alike.setdefault((tensor.dtype, tensor.device), [])
            if sum(one.numel() for one in some) + tensor.numel() > _BLOCK:
                self._add_up_joined(some)
                some.clear()
            some.append(tensor)
        for some in alike.values():
            self._add_up_joined(some)

    def _add_up_joined(self, tensors: Sequence[Tensor]) -> None:
        joined = self.add_up_in_order(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, part in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def add_up_into(self, out: Tensor | None, tensor: Tensor) -> None:
        """The same into `out`, of the same shape and type on any device, which the first process alone gives."""
        blocks = None if out is None else iter(out.view(-1).split(_BLOCK))
        for _, total in self._block_sums(tensor):
            if blocks is not None:
                next(blocks).copy_(total)

    def _block_sums(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every block of a contiguous tensor, and its sum over the processes, [E] both."""
        if self.count == 1 or not tensor.numel():
            return
        for block in tensor.view(-1).split(_BLOCK):
            with self._talking():
                total = self._block_sum(block)
            yield block, total

    def _block_sum(self, block: Tensor) -> Tensor:
        """Every process adds up one part of the block, and all give each other what they have."""
        entries = block.to(self.device, torch.uint8 if block.dtype == torch.bool else block.dtype)
        size = -(-entries.numel() // self.count)
        sent = entries.new_zeros(size * self.count)
        sent[: entries.numel()] = entries
        received = torch.empty_like(sent)  # this process's part, from all
        torch.distributed.all_to_all_single(received, sent)
        first, *others = received.split(size)
        total = first.double()
        for part in others:
            total += part
        torch.distributed.all_gather(list(sent.split(size)), total.to(sent.dtype))
        return sent[: entries.numel()]

    def meet(self, *numbers: int, error: BaseException | None = None) -> list[list[int]]:
        """Waits for all processes, and hears what each has to say.

        An error ends them all: it is raised where it happened, if in several then in the first of these.

        Args:
            numbers: up to four, int64; all processes that meet in earnest say as many.
            error: why this process cannot go on.

        Returns:
            The numbers of every process, in their order.

        Raises:
            BaseException: `error`.
            EndedByAnother: another process has one.
            InterruptedRun: another process has died (in the first; in the others EndedByAnother).
        """
        if self.count == 1:
            if error is not None:
                raise error
            return [list(numbers)]
        said = torch.zeros(1 + _NUMBERS, dtype=torch.int64)
        said[0] = _exit_code(error)
        said[1 : 1 + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        heard = [torch.empty_like(said) for _ in range(self.count)]
        with self._talking():
            torch.distributed.all_gather(heard, said, group=self._words)
        codes = [int(words[0]) for words in heard]
        erring = next((index for index, code in enumerate(codes) if code), None)
        if erring is None:
            return [words[1 : 1 + len(numbers)].tolist() for words in heard]
        self.ended = True
        if erring == self.index and error is not None:
            raise error
        raise EndedByAnother(codes[erring])

    def tell(self, text: str) -> list[str]:
        """What every process says, in their order. Raises as `meet` does."""
        if self.count == 1:
            return [text]
        own = text.encode()
        lengths = [length for (length,) in self.meet(len(own))]
        said = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        said[: len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        heard = [torch.empty_like(said) for _ in lengths]
        with self._talking():
            torch.distributed.all_gather(heard, said, group=self._words)
        return [bytes(words[:length].tolist()).decode() for words, length in zip(heard, lengths, strict=True)]

    def give(self, data: Tensor) -> None:
        """Hands bytes to the first process, which takes them.

        Args:
            data: [bytes] uint8, on the CPU.
        """
        with self._talking():
            torch.distributed.send(torch.tensor([data.numel()]), 0, group=self._words)
            torch.distributed.send(data, 0, group=self._words)

    def take(self, process: int) -> Tensor:
        """What another process gives to this one, the first."""
        size = torch.zeros(1, dtype=torch.int64)
        with self._talking():
            torch.distributed.recv(size, process, group=self._words)
            data = torch.empty(int(size), dtype=torch.uint8)
            torch.distributed.recv(data, process, group=self._words)
        return data

    def hand(self, data: Tensor, sender: int, receiver: int) -> None:
        """Copies a tensor from one process to another; the rest look on.

        Args:
            data: contiguous; of the receiver, what is written to, of the same shape and type.
            sender: index of the one.
            receiver: index of the other.
        """
        with self._talking():
            if self.index == sender:
                torch.distributed.send(data, receiver, group=self._group_of(data))
            elif self.index == receiver:
                torch.distributed.recv(data, sender, group=self._group_of(data))

    def spread(self, data: Tensor, sender: int) -> None:
        """Copies a tensor of one process over those of the others, contiguous and of the same shape and type."""
        if self.count > 1 and data.numel():
            with self._talking():
                torch.distributed.broadcast(data, sender, group=self._group_of(data))

    def _group_of(self, data: Tensor) -> Any:
        return self._words if data.device.type == "cpu" else None

    def agree(self, on: str) -> None:
        """Holds what all processes have to have alike against each other.

        Raises:
            UsageError: they do not (in the first; in the others EndedByAnother).
        """
        if len({digest for (digest,) in self.meet(zlib.crc32(on.encode()))}) > 1:
            self.end(
                UsageError("the processes do not compute the same: give all of them the same files, fillm and hardware")
            )

    def end(self, error: FillmError) -> NoReturn:
        """Ends all processes with an error that all of them know of, once all are here; the first tells of it."""
        self.meet()
        self.ended = True
        raise error if self.first else EndedByAnother(error.exit_code)

    def outlive(self, error: FillmError) -> str:
        """Goes on after an error that all processes have heard of at a meeting.

        Args:
            error: what it was raised as in this one.

        Returns:
            What it says, the same in all.
        """
        if self.count == 1:
            return str(error)
        self.ended = False
        said = self.tell("" if isinstance(error, EndedByAnother) else str(error))
        return next(text for text in said if text)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around the work: what ends one process ends the others at their next meeting, and all leave at once."""
        done = False
        try:
            try:
                yield
                self.meet()
                done = True
            except BaseException as error:
                if self.ended and isinstance(error, KeyboardInterrupt):
                    self._tell_what_came_before(error)
                if not self.ended and self.in_step and self.count > 1:
                    self.abandon(error)
                if not self.ended:
                    self.meet(error=error)
                raise
        finally:
            self._disband(done)

    def _disband(self, done: bool) -> None:
        if self.count == 1:
            return
        if not done:
            _no_longer_stopped()
        # What a sharded model leaves in cycles holds the groups, whose threads must have ended before the interpreter.
        gc.collect()
        # A group on GPUs is left as it is where a process may be gone: it would be waited for.
        with suppress(RuntimeError):
            torch.distributed.destroy_process_group(None if done or self.device.type == "cpu" else self._words)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Says in plain words that a process is gone."""
        try:
            yield
        except RuntimeError as error:
            self.ended = True
            if is_out_of_memory(error):
                raise
            raise self._why_lost() from error

    def _why_lost(self) -> FillmError:
        """What to say where another process is gone."""
        if self._board.check([_LEFT]):
            return EndedByAnother(int(self._board.get(_LEFT)))
        lost = InterruptedRun("another process of the run has died; continue with --resume")
        return lost if self.first else EndedByAnother(lost.exit_code)

    def _tell_what_came_before(self, signalled: KeyboardInterrupt) -> None:
        """Raises what was already ending the run when a signal came in: torchrun stops the rest where one is gone."""
        before = signalled.__context__
        while before is not None:
            if isinstance(before, FillmError):
                raise before
            if _is_lost_connection(before):
                raise self._why_lost() from before
            before = before.__context__

    def abandon(self, error: BaseException) -> NoReturn:
        """Ends all processes from the midst of what they compute together, where the others are at no meeting.

        They find this one gone, and on the board that it has told why.

        Raises:
            Exception: `error`, if it is this process's own and the first.
            EndedByAnother: another process has one.
            InterruptedRun: another process has died (in the first; in the others EndedByAnother).
        """
        self.ended = True
        if self._board.check([_LEFT]) or _is_lost_connection(error):
            raise self._why_lost() from error
        self._board.set(_LEFT, str(_exit_code(error)))
        raise error


def several_started() -> bool:
    """Whether `torchrun` started this process beside others.

    Raises:
        UsageError: what it sets is there in part; schedulers set some of it themselves.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.strip().isdecimal():
        raise UsageError(f"the environment says WORLD_SIZE={count}: start several processes by torchrun, or unset it")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if int(count) > 1 and missing:
        raise UsageError(
            f"the environment says WORLD_SIZE={count} without {', '.join(missing)}: start several processes by "
            "torchrun, or unset WORLD_SIZE"
        )
    return int(count) > 1


def refuse_several(command: str) -> None:
    """Ends a command that takes one process where there are several; the first of them tells of it.

    Raises:
        UsageError: in the first.
        EndedByAnother: in the others.
    """
    if several_started():
        error = UsageError(f"{command} runs in one process; start it without torchrun")
        raise error if os.environ.get("RANK", "0") == "0" else EndedByAnother(error.exit_code)


def _no_longer_stopped() -> None:
    """Where one process is gone torchrun stops the others: what is to be said of it is not to be replaced by that."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether torch.distributed finds another process gone; gloo says so in the words of a RuntimeError."""
    told = isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection " in str(error))
    return told or isinstance(error, torch.distributed.DistError)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    return InterruptedRun.exit_code if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


def _joined(cpu: bool) -> tuple[Any, Any]:
    """The state of this process among the others, and the store that all of them read and write."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise UsageError("several processes need the package accelerate; pip install 'fillm[train]'") from None
    # What torchrun starts again finds the store of the first time, with the addresses of processes that are gone.
    store, rank, count = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return PartialState(cpu=cpu, store=store, rank=rank, world_size=count), store
