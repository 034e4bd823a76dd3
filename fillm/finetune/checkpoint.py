"""A checkpoint: one safetensors file that is either whole or not there.

It holds the trained parameters, both AdamW moments, the log, and nothing that could run code. Sample order, learning
rate and dropout are functions of the seed and the step, so the number of the step is all the rest of the state.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fillm.errors import RunFolderError

LOG_COLUMNS = ("step", "epoch", "samples", "tokens", "loss", "lr", "gradient_norm", "eval_loss", "seconds")
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
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, progressed: Progressed
) -> None:
    """Writes beside `path` and renames, so that a checkpoint once written is only ever replaced by a whole one.

    Args:
        path: the file.
        parameters: the parameters that are trained, by name.
        optimizer: an AdamW over them that has taken a step.
        progressed: how far it has come.

    Raises:
        RunFolderError: the disk is full or the file cannot be written; the last checkpoint stays.
    """
    tensors = {f"parameter/{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        tensors |= {f"{moment}/{name}": optimizer.state[value][moment] for moment in _MOMENTS}
    tensors["log"] = torch.tensor(progressed.log, dtype=torch.float64).reshape(-1, len(LOG_COLUMNS))
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    numbers = {"step": str(progressed.step), "micro_batch": str(progressed.micro_batch)}
    unfinished = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, unfinished, metadata=numbers)
        with open(unfinished, "rb") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise RunFolderError(
            f"{path}: cannot be written ({error}); free some disk, then continue with --resume"
        ) from None


def load_checkpoint(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Progressed:
    """Puts a checkpoint's values into `parameters` and `optimizer`.

    Raises:
        RunFolderError: damaged, or of another model.
    """
    try:
        with safe_open(str(path), framework="pt") as stored:
            numbers, names = stored.metadata(), set(stored.keys())
            wanted = {"log"} | {f"{part}/{name}" for name in parameters for part in ("parameter", *_MOMENTS)}
            if names != wanted:
                raise RunFolderError(f"{path}: made from another model (differs in {min(names ^ wanted)}); --overwrite")
            step = int(numbers["step"])
            for name, value in parameters.items():
                with torch.no_grad():
                    value.copy_(stored.get_tensor(f"parameter/{name}"))
                moments = {part: stored.get_tensor(f"{part}/{name}").to(value.device) for part in _MOMENTS}
                count = torch.tensor(float(step), dtype=torch.float32, device=value.device)
                optimizer.state[value] = {"step": count, **moments}
            log = stored.get_tensor("log").tolist()
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise RunFolderError(f"{path}: damaged checkpoint ({error}); start anew with --overwrite") from None
    return Progressed(step=step, micro_batch=int(numbers["micro_batch"]), log=log)
