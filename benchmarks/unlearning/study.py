"""One model: its masks, and what unlearning inside each of them costs the retain set."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.end_to_end.workload import FICTIONAL, RECIPE, TOFU, trained_folder
from benchmarks.unlearning.choices import Choice, level_crossing, masks
from benchmarks.unlearning.settings import FIRST_RATE, RATES, UnlearningConfig
from fillm.data import Row, load_rows
from fillm.finetune.architectures import architecture_config, new_model
from fillm.masks import Mask
from fillm.models import load_model, load_tokenizer
from fillm.rank.default_model import cache_folder
from fillm.report.figures.damage import FEW_STEPS
from fillm.unlearn import unlearn_model
from fillm.unlearn.checkpoint import LOG_COLUMNS
from fillm.unlearn.masked_optimizer import mask_digest

Record = dict[str, Any]
Cell = tuple[str, str]  # choice, loss
FORGET_LEVELS = ("forget_low", "forget_high")  # the two levels of the forget loss
AT_LEVELS = ("retain_at_low", "retain_at_high")  # retain losses at them
_STEP, _FORGET, _RETAIN = (LOG_COLUMNS.index(name) for name in ("step", "forget_loss", "retain_loss"))


@dataclass(frozen=True, kw_only=True)
class Recited:
    """A model that recites its rows, and the rows.

    Attributes:
        rows: `forget` and `retain`, of unlearning and of the losses that are measured.
        ranked: likewise, what masks are made from.
    """

    seed: int
    model: nn.Module
    tokenizer: Any
    rows: dict[str, list[Row]]
    ranked: dict[str, list[Row]]
    base: Callable[[], Path]


def recited(config: UnlearningConfig, tofu: bool, seed: int, say: Callable[[str], None]) -> Recited:
    """Trains, or takes from the cache, the model of one seed."""
    specs = TOFU if tofu else FICTIONAL
    rows = {name: load_rows(spec, data_root=config.data_root)
            for name, spec in zip(("forget", "retain"), specs, strict=True)}  # fmt: skip
    recipe: Record = {**RECIPE, "architecture": config.architecture, "seed": seed}
    if config.quick:
        rows = {name: some[:20] for name, some in rows.items()}
        recipe |= {"architecture": "tiny", "vocab_size": 300, "epochs": 1, "target_loss": None}
    folder = trained_folder([*rows["retain"], *rows["forget"]], recipe, say)
    tokenizer = load_tokenizer(str(folder))

    def base() -> Path:
        path = cache_folder() / f"{folder.name}-untrained"
        if not (path / "config.json").exists():
            new_model(architecture_config(recipe["architecture"]), tokenizer, seed).save_pretrained(path)
        return path

    ranked = rows
    if config.held_out:
        ranked, rows = ({**rows, "retain": rows["retain"][first::2]} for first in (0, 1))
    model = load_model(str(folder), device="cpu")
    return Recited(seed=seed, model=model, tokenizer=tokenizer, rows=rows, ranked=ranked, base=base)


def next_rate(tried: Mapping[float, Record]) -> float | None:
    """The peak rate to try after some, or None.

    Args:
        tried: the runs of one choice and loss, by rate.
    """
    if not tried:
        return FIRST_RATE
    lowest, highest = min(tried), max(tried)
    if lowest > RATES[0] and tried[lowest]["steps"] < FEW_STEPS and not math.isnan(tried[lowest][AT_LEVELS[-1]]):
        return RATES[RATES.index(lowest) - 1]
    if highest < RATES[-1] and math.isnan(tried[highest][AT_LEVELS[-1]]):
        return RATES[RATES.index(highest) + 1]
    return None


def runs(
    config: UnlearningConfig, one: Recited, wanted: list[Choice], done: list[Record], say: Callable[[str], None]
) -> Iterator[Record]:
    """Every loss inside every mask of one model at the rates of `next_rate`, but for what is done.

    Choices that select the same weights are trained once: the same bits twice need no second run.
    """
    of_cells: dict[Cell, dict[float, Record]] = {}
    of_masks: dict[tuple[str, str, float], Record] = {}
    for record in done:
        of_cells.setdefault((record["choice"], record["loss"]), {})[record["lr"]] = record
        of_masks[record["mask"], record["loss"], record["lr"]] = record
    cells = [(choice, loss) for choice in wanted for loss in config.chosen_losses]
    left = {choice.name for choice, loss in cells if next_rate(of_cells.get((choice.name, loss), {})) is not None}
    missing = [choice for choice in wanted if choice.name in left]
    for choice, mask in masks(config, one.model, one.tokenizer, one.ranked, one.base, missing):
        digest = mask_digest(mask)[:16]
        for loss in config.chosen_losses:
            tried = of_cells.setdefault((choice.name, loss), {})
            while (rate := next_rate(tried)) is not None:
                same = of_masks.get((digest, loss, rate))
                record = (
                    {**same, "choice": choice.name} if same else unlearned(config, one, choice.name, mask, loss, rate)
                )
                tried[rate] = of_masks[digest, loss, rate] = record = {**record, "mask": digest}
                told = ", ".join(f"{record[column]:.3f}" for column in AT_LEVELS)
                say(f"model {one.seed}: {loss} {rate:g}, {choice.name}: {record['steps']} steps, retain loss {told}")
                yield record


def unlearned(
    config: UnlearningConfig, one: Recited, choice: str, mask: Mask, loss: str, rate: float, **options: Any
) -> Record:
    """One unlearning, up to the higher level; the model comes back as it was.

    Args:
        config: the settings; its `levels` are where the retain loss is read.
        one: the model and its rows.
        choice: the mask's name in the record.
        mask: what may change.
        loss: as `--loss` of `fillm.unlearn`.
        rate: the peak rate.
        options: of the loss, and other settings of `fillm.unlearn_model`.

    Returns:
        Losses before and after and at the levels, steps, and what was selected.
    """
    result = _run(config, one, mask, loss, rate, stop=True, **options)
    losses = _evaluated(result)[:, 1:]
    crossings = [level_crossing(losses[:, 0], losses[:, 1], level) for level in config.levels]
    return {
        "model_parameters": one.model.num_parameters(), "seed": one.seed, "choice": choice, "loss": loss,
        "lr": rate, "selected_parameters": mask.count, "selected_tensors": len(mask), "steps": result.steps,
        "forget_start": losses[0, 0], "retain_start": losses[0, 1],
        "forget_end": losses[-1, 0], "retain_end": losses[-1, 1],
        **dict(zip(FORGET_LEVELS, config.levels, strict=True)), **dict(zip(AT_LEVELS, crossings, strict=True)),
    }  # fmt: skip


def losses_after(
    config: UnlearningConfig, one: Recited, mask: Mask, loss: str, rate: float
) -> dict[int, tuple[float, float]]:
    """One unlearning through all its steps, whatever the losses become; the model comes back as it was.

    Args:
        config: the settings; evaluated every `eval_every` of its `max_steps`.
        one: the model and its rows.
        mask: what may change.
        loss: as `--loss` of `fillm.unlearn`.
        rate: the peak rate.

    Returns:
        Steps taken, from 0 -> forget and retain loss, in nats a token.
    """
    return {
        int(step): (float(forget), float(retain))
        for step, forget, retain in _evaluated(_run(config, one, mask, loss, rate, stop=False))
    }


def _run(config: UnlearningConfig, one: Recited, mask: Mask, loss: str, rate: float, stop: bool, **options: Any) -> Any:
    parameters = dict(one.model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in mask}
    forget, retain = ([row.fields for row in one.rows[name]] for name in ("forget", "retain"))
    try:
        result = unlearn_model(
            one.model, one.tokenizer, forget, retain, mask=mask, loss=loss, lr=rate, batch_size=config.batch_size,
            max_steps=config.max_steps, eval_every=config.eval_every, eval_retain=config.eval_retain,
            stop_forget_loss=max(config.levels) if stop else None, seed=one.seed, **options,
        )  # fmt: skip
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)
    assert result.verification.outside_mask_bit_equal
    return result


def _evaluated(result: Any) -> np.ndarray:
    """Step, forget and retain loss before the first step and at every evaluation."""
    rows = [[row[_STEP], row[_FORGET], row[_RETAIN]] for row in result.log if not math.isnan(row[_FORGET])]
    return np.array([[0, result.before.forget, result.before.retain], *rows])
