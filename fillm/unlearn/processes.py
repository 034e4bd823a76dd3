"""One process or several under `torchrun`: who does what, what is added up, and who writes.

Samples are dealt out to the processes; losses and gradients are summed over them with torch.distributed, once a step.
All processes hold the same weights and take the same step. The first one alone holds the run folder and writes; the
others read from it what was saved.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fillm.errors import UsageError
from fillm.models import resolve_device
from fillm.runs import RunFolder
from fillm.runs.folder import read_stage, read_state

Item = TypeVar("Item")


class Processes:
    """The processes of this run.

    Args:
        device: the option `--device`; with several processes and CUDA, each takes the device of its local rank.

    Attributes:
        index, count: of this process, and how many there are.
        device: where this process computes.

    Raises:
        UsageError: several processes without the package accelerate.
    """

    def __init__(self, device: str = "auto") -> None:
        self._state: Any = None
        self.index, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._state = _joined(cpu=resolve_device(device).type == "cpu")
            self.index, self.count = self._state.process_index, self._state.num_processes
            self.device = self._state.device
        else:
            self.device = resolve_device(device)

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """What of `items` is this process's to do."""
        return list(items[self.index :: self.count])

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def decide(self, answer: bool) -> bool:
        """The first process's answer, for all."""
        return bool(self.add_up(torch.tensor([float(answer and self.first)], device=self.device)).item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def leave(self) -> None:
        """The work is done, in all of them."""
        self.wait()
        if self.count > 1:
            self._state.destroy_process_group()


def _joined(cpu: bool) -> Any:
    try:
        from accelerate import PartialState
    except ImportError:
        raise UsageError("several processes need the package accelerate; pip install 'fillm[train]'") from None
    return PartialState(cpu=cpu)


class FollowedFolder:
    """The run folder as a process sees it that does not hold it: it reads what was saved and writes nothing.

    Args:
        out: the folder to make.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(out).expanduser().resolve()
        self.partial = self.out.with_name(self.out.name + ".partial")

    def check_identity(self, identity: Mapping[str, str]) -> None:
        """The first process checks."""

    def save_state(self, stage: str, cursor: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """The first process saves."""

    def save_stage(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """The first process saves."""

    def load_state(self) -> tuple[str, int, dict[str, Tensor], dict[str, Any]] | None:
        """As `RunFolder.load_state`."""
        return read_state(self.partial)

    def load_stage(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """As `RunFolder.load_stage`."""
        return read_stage(self.partial, name)

    def finish(self, writer: Callable[[Path], Any]) -> None:
        """The first process writes."""

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> "FollowedFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Folder = RunFolder | FollowedFolder
