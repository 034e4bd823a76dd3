"""What an unlearning came to: a table to look at, and the files of its folder."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fillm.finetune.log import write_log
from fillm.masks import Mask
from fillm.models import model_fingerprint, quiet_transformers
from fillm.runs import write_record
from fillm.unlearn.checkpoint import LOG_COLUMNS
from fillm.unlearn.influence import OneShot
from fillm.unlearn.stopping import Evaluation
from fillm.unlearn.untouched import Verification


@dataclass(frozen=True)
class UnlearnResult:
    """What an unlearning came to.

    Attributes:
        model: the model, changed in place; with `lora_rank`, the adapters merged into it.
        mask: what could change.
        verification: whether nothing else did, and whether something did.
        before, after: mean losses of the evaluated samples, in nats a token; `after.step` is the step whose weights the
            model has.
        steps: optimiser steps taken.
        stopped: why the run ended before its last step, empty if it did not.
        one_shot: what was predicted of a `influence` step; None for other losses.
        log: one row a step, columns as in `fillm.unlearn.checkpoint.LOG_COLUMNS`.
        savings: what freezing all else saved, as `frozen_outside` tells it; empty for `influence`.
        seconds: of training.
    """

    model: nn.Module
    mask: Mask
    verification: Verification
    before: Evaluation
    after: Evaluation
    steps: int
    stopped: str
    one_shot: OneShot | None
    log: list[list[float]]
    savings: dict[str, int | None]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What `verification.json` holds."""
        sides = {"forget": (self.before.forget, self.after.forget), "retain": (self.before.retain, self.after.retain)}
        told: dict[str, Any] = {
            **asdict(self.verification),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **{f"{name}_loss": {"before": first, "after": last} for name, (first, last) in sides.items()},
            "steps": self.steps,
            "kept_step": self.after.step,
            "stopped": self.stopped or None,
        }
        if self.one_shot is not None:
            changes = {"forget": self.one_shot.forget_change, "retain": self.one_shot.retain_change}
            told["influence"] = {
                "eta": self.one_shot.eta,
                "gain": self.one_shot.gain,
                **{
                    f"{name}_change": {"predicted": changes[name], "measured": last - first}
                    for name, (first, last) in sides.items()
                },
            }
        return told

    def lines(self) -> list[str]:
        """A table for a person."""
        rows = [("forget", self.before.forget, self.after.forget), ("retain", self.before.retain, self.after.retain)]
        predicted = {} if self.one_shot is None else {"forget": self.one_shot.forget_change}
        if self.one_shot is not None:
            predicted["retain"] = self.one_shot.retain_change
        head = f"{'loss':<8}{'before':>12}{'after':>12}{'change':>12}" + (f"{'predicted':>12}" if predicted else "")
        out = [head]
        for name, first, last in rows:
            line = f"{name:<8}{first:>12.5f}{last:>12.5f}{last - first:>+12.5f}"
            out.append(line + (f"{predicted[name]:>+12.5f}" if predicted else ""))
        found = self.verification
        outside = sum(p.numel() for p in self.model.parameters()) - found.selected_parameters
        out.append(
            f"outside the mask: {outside:,} weights, bit-equal to the start; inside: {found.changed_parameters:,} of "
            f"{found.selected_parameters:,} changed"
        )
        if self.steps:
            why = f" ({self.stopped})" if self.stopped else ""
            out.append(f"{self.steps} steps in {self.seconds:.0f} s{why}; kept: step {self.after.step}")
        return out


def write_result(
    result: UnlearnResult,
    folder: Path,
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    dtypes: Mapping[str, torch.dtype],
    adapter: Path | None,
) -> None:
    """The files of a finished folder.

    Args:
        result: what the run came to.
        folder: empty; `run.yaml` is written last.
        record: what `run.yaml` holds, without the result.
        tokenizer: saved beside the model; None where there is none.
        dtypes: by parameter, what the model was saved in before; others keep their own.
        adapter: folder of the adapters that were trained, taken along.

    Raises:
        OSError: if the disk refuses.
    """
    model, target = result.model, folder / "model"
    with quiet_transformers():
        adapted = hasattr(model, "merge_and_unload")
        model = copy.deepcopy(model) if adapted else model
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
        if adapted:  # the names of what is merged are others than those it was loaded under
            model.save_pretrained(folder / "adapter")
            model = model.merge_and_unload()
        elif adapter is not None:
            shutil.copytree(adapter, folder / "adapter")
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
    result.mask.save(folder / "mask.safetensors")
    write_log(result.log, folder, LOG_COLUMNS)
    told = result.as_json()
    (folder / "verification.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    prints = {**record["fingerprints"], "model": model_fingerprint(model)}
    write_record(folder, {**record, "fingerprints": prints, "result": {**told, "savings": result.savings}})
