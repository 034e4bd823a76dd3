"""A training's state in its run folder: the trained parameters, both AdamW moments, the log, nothing that could run.

Sample order, learning rate and dropout are functions of the seed and the step, so the number of the step is all the
rest of the state.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fillm.errors import RunFolderError
from fillm.finetune.log import LOG_COLUMNS
from fillm.runs import RunFolder

_STAGE = "training"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progressed:
    """How far a training has come.

    Attributes:
        step: optimiser steps taken.
        micro_batch: samples in one forward pass, after what memory has forced.
        log: one row a step, float64, columns as in `LOG_COLUMNS`; `eval_loss` is NaN where nothing was measured.
    """

    step: int
    micro_batch: int
    log: list[list[float]] = field(default_factory=list)


def save_checkpoint(
    folder: RunFolder, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, progressed: Progressed
) -> None:
    """Saves the state; the one before is only ever replaced by a whole one.

    Args:
        folder: of the run.
        parameters: the parameters that are trained, by name.
        optimizer: an AdamW over them that has taken a step.
        progressed: how far it has come.

    Raises:
        RunFolderError: the disk is full or cannot be written; the last state stays.
    """
    tensors = {f"parameter/{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        tensors |= {f"{moment}/{name}": optimizer.state[value][moment] for moment in _MOMENTS}
    tensors["log"] = torch.tensor(progressed.log, dtype=torch.float64).reshape(-1, len(LOG_COLUMNS))
    folder.save_state(_STAGE, progressed.step, tensors, {"micro_batch": progressed.micro_batch})


def load_checkpoint(
    folder: RunFolder, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Progressed | None:
    """Puts the saved state into `parameters` and `optimizer`; None if there is none.

    Raises:
        RunFolderError: damaged, or of another model.
    """
    saved = folder.load_state()
    if saved is None:
        return None
    _, step, tensors, meta = saved
    shapes = {"log": (step, len(LOG_COLUMNS))}
    shapes |= {f"{part}/{name}": tuple(p.shape) for name, p in parameters.items() for part in ("parameter", *_MOMENTS)}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != shapes:
        differs = min(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise RunFolderError(
            f"{folder.partial}: made from another model (differs in {differs}); start anew with --overwrite"
        )
    for name, value in parameters.items():
        with torch.no_grad():
            value.copy_(tensors[f"parameter/{name}"])
        moments = {part: tensors[f"{part}/{name}"].to(value.device) for part in _MOMENTS}
        count = torch.tensor(float(step), dtype=torch.float32, device=value.device)
        optimizer.state[value] = {"step": count, **moments}
    return Progressed(step=step, micro_batch=meta["micro_batch"], log=tensors["log"].tolist())
