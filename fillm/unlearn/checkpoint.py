"""An unlearning's state in its run folder: selected entries, the optimiser's state, the log; nothing that could run.

Sample order and learning rate are functions of the seed and the step; the weights outside the mask are the model's own.
So a checkpoint is as small as the mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fillm.errors import RunFolderError
from fillm.unlearn.followed import Folder
from fillm.unlearn.masked_optimizer import MaskedOptimizer
from fillm.unlearn.selected import SelectedEntries
from fillm.unlearn.stopping import Evaluation

LOG_COLUMNS = (
    "step", "epoch", "samples", "tokens", "forget_objective", "retain_objective", "lr", "gradient_norm", "forget_loss",
    "retain_loss", "seconds",
)  # fmt: skip
_STAGE = "unlearning"


@dataclass
class Progressed:
    """How far an unlearning has come.

    Attributes:
        step: optimiser steps taken.
        limit: samples in one forward pass of a process that memory has forced; None where it has not.
        log: one row a step, columns as in `LOG_COLUMNS`; NaN where nothing was measured.
        evaluations: in the order of their steps, that of the start first.
        best: the selected entries at the best evaluation, where that is not the last state and bounds were given.
        stopped: why the run ended before its last step, empty if it did not.
    """

    step: int
    limit: int | None = None
    log: list[list[float]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    stopped: str = ""


def save_checkpoint(
    folder: Folder, entries: SelectedEntries, optimizer: MaskedOptimizer, progressed: Progressed
) -> None:
    """Saves the state; the one before is only ever replaced by a whole one.

    Raises:
        RunFolderError: the disk is full or cannot be written; the last state stays.
    """
    tensors = {f"parameter/{name}": value for name, value in entries.take().items()}
    tensors |= {f"best/{name}": value for name, value in (progressed.best or {}).items()}
    tensors["log"] = torch.tensor(progressed.log, dtype=torch.float64).reshape(-1, len(LOG_COLUMNS))
    held = optimizer.state_dict()
    tensors |= {f"master/{name}": value for name, value in held["masters"].items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in held["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    meta = {
        "limit": progressed.limit,
        "evaluations": [vars(one) for one in progressed.evaluations],
        "optimizer": numbers,
        "stopped": progressed.stopped,
    }
    folder.save_state(_STAGE, progressed.step, tensors, meta)


def load_checkpoint(folder: Folder, entries: SelectedEntries, optimizer: MaskedOptimizer) -> Progressed | None:
    """Puts the saved state into the model's selected entries and the optimiser; None if there is none.

    Raises:
        RunFolderError: damaged, or of another mask.
    """
    saved = folder.load_state()
    if saved is None or saved[0] != _STAGE:
        return None
    _, step, tensors, meta = saved
    sizes = {name: value.numel() for name, value in _part(tensors, "parameter").items()}
    if sizes != entries.counts:
        raise RunFolderError(f"{folder.partial}: made with another mask; start anew with --overwrite")
    entries.put(_part(tensors, "parameter"))
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in meta["optimizer"].items()}
    for key, value in _part(tensors, "optimizer").items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state, "masters": _part(tensors, "master")})
    return Progressed(
        step=step,
        limit=meta["limit"],
        log=tensors["log"].tolist(),
        evaluations=[Evaluation(**one) for one in meta["evaluations"]],
        best=_part(tensors, "best") or None,
        stopped=meta["stopped"],
    )


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    head = part + "/"
    return {name.removeprefix(head): value for name, value in tensors.items() if name.startswith(head)}
