"""The run folder under `torchrun`: the first process holds it and writes, the others read from it what was saved."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fillm.paths import out_path
from fillm.runs import RunFolder
from fillm.runs.folder import read_stage, read_state


class FollowedFolder:
    """The run folder as a process sees it that does not hold it: it reads what was saved and writes nothing.

    Args:
        out: the folder to make.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = out_path(out)
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
