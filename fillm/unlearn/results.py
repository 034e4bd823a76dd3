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
from fillm.models import model_fingerprint, quiet_transformers, save_tokenizer
from fillm.runs import write_record
from fillm.unlearn.checkpoint import LOG_COLUMNS
from fillm.unlearn.curvature import TWO_BACKWARD_PASSES
from fillm.unlearn.influence import Expansion, OneShot
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
            told["influence"] = _as_predicted(
                self.one_shot, {name: last - first for name, (first, last) in sides.items()}
            )
        return told

    def lines(self) -> list[str]:
        """A table for a person."""
        rows = [("forget", self.before.forget, self.after.forget), ("retain", self.before.retain, self.after.retain)]
        out = [f"{'loss':<8}{'before':>12}{'after':>12}{'change':>12}"]
        out += [f"{name:<8}{first:>12.5f}{last:>12.5f}{last - first:>+12.5f}" for name, first, last in rows]
        if self.one_shot is not None:
            out += _predicted_lines(self.one_shot, {name: last - first for name, first, last in rows})
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


def _as_predicted(one_shot: OneShot, measured: Mapping[str, float]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "eta": one_shot.eta,
        "gain": one_shot.forget.slope,
        "curvature_by": one_shot.curvature_by,
    }
    for name, change in measured.items():
        expansion: Expansion = getattr(one_shot, name)
        told[f"{name}_change"] = {
            "predicted": expansion.predicted(one_shot.eta),
            "measured": change,
            "first_order": expansion.first_order(one_shot.eta),
            "fisher": expansion.by_fisher(one_shot.eta),
            "doubtful": expansion.doubtful(one_shot.eta),
        }
    return told


def _predicted_lines(one_shot: OneShot, measured: Mapping[str, float]) -> list[str]:
    """A table of what the step was to do beside what it did, and how far to trust it."""
    eta = one_shot.eta
    out = [f"step theta - {eta:.4g} u; change of the loss, measured and predicted:"]
    out.append(f"{'':<8}{'measured':>12}{'predicted':>12}{'first order':>13}{'by Fisher':>12}")
    for name, change in measured.items():
        expansion: Expansion = getattr(one_shot, name)
        numbers = f"{change:>+12.3g}{expansion.predicted(eta):>+12.3g}{expansion.first_order(eta):>+13.3g}"
        out.append(f"{name:<8}{numbers}{expansion.by_fisher(eta):>+12.3g}")
    doubted = [name for name in measured if getattr(one_shot, name).doubtful(eta)]
    if doubted:
        out.append(
            f"doubtful: the second-order part of the {' and '.join(doubted)} change is larger than the first, so the "
            "third may count; trust the prediction of a smaller --eta"
        )
    if one_shot.curvature_by != TWO_BACKWARD_PASSES:
        out.append(f"curvature by {one_shot.curvature_by}")
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
            save_tokenizer(tokenizer, target)
    result.mask.save(folder / "mask.safetensors")
    write_log(result.log, folder, LOG_COLUMNS)
    told = result.as_json()
    (folder / "verification.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    prints = {**record["fingerprints"], "model": model_fingerprint(model)}
    write_record(folder, {**record, "fingerprints": prints, "result": {**told, "savings": result.savings}})
