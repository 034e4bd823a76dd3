"""One pair of models: every method unlearns to one forget loss, and is scored beside the retain-only model."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.forget_quality.models import Pair
from benchmarks.forget_quality.one_shot import one_shot, whole_update
from benchmarks.forget_quality.scoring import Scorer, Scores
from benchmarks.forget_quality.settings import QUICK_RISE, ForgetQualityConfig
from benchmarks.unlearning.choices import choices, masks
from benchmarks.unlearning.settings import UnlearningConfig
from benchmarks.unlearning.study import AT_LEVELS, Record, next_rate
from fillm.masks import Mask
from fillm.models import load_model
from fillm.report.figures.damage import FEW_STEPS
from fillm.unlearn import unlearn_model
from fillm.unlearn.config import INFLUENCE

FULL, RETAIN_ONLY, OTHER_SEED = "full model", "retain-only model", "retain-only model, another seed"
NO_LOSS = "none"  # of what was not unlearned
Weights = dict[str, Tensor]
Key = tuple[str, str]  # choice, loss


def compared(
    config: ForgetQualityConfig,
    one: Pair,
    other: Callable[[], Pair] | None,
    done: set[Key],
    say: Callable[[str], None],
) -> Iterator[Record]:
    """A record for the models themselves and for every choice and loss, but for what is done.

    Args:
        config: the settings.
        one: the models.
        other: makes those of another seed, whose retain-only model shows what two models that never saw the rows come
            to; asked last, as they may have to be trained.
        done: what is known already.
        say: told of every record.
    """
    wanted = [(choice, loss) for choice in config.chosen_choices for loss in config.chosen_losses]
    references = [FULL, RETAIN_ONLY, *([OTHER_SEED] if other is not None else [])]
    if {*wanted, *((name, NO_LOSS) for name in references)} <= done:
        return
    score = Scorer(config, one.scored, one.tokenizer)
    judge = score(load_model(str(one.retain_only), device="cpu"))
    before = score(one.full)
    goal = before.forget_loss + QUICK_RISE if config.quick else config.forget_loss or judge.forget_loss

    def record(choice: str, loss: str, scores: Scores, more: Record) -> Record:
        found = {"seed": one.seed, "choice": choice, "loss": loss, **more, "target_forget_loss": goal}
        found |= {"forget_loss": scores.forget_loss, **scores.figures, **scores.beside(judge)}
        told = f"forget loss {scores.forget_loss:.2f}, utility {found['model_utility']:.3f}"
        say(f"pair {one.seed}: {choice}, {loss}: {told}, Forget Quality {found['forget_quality']:.2g}")
        return found

    untouched = {"selected_parameters": 0, "steps": 0, "lr": math.nan, "eta": math.nan}
    for name, scores in ((FULL, before), (RETAIN_ONLY, judge)):
        if (name, NO_LOSS) not in done:
            yield record(name, NO_LOSS, scores, untouched)
    named = ",".join(config.chosen_choices)
    of_masks = UnlearningConfig(fraction=config.fraction, draws=1, choices=named)
    missing = [one for one in choices(of_masks) if any((one.name, loss) not in done for loss in config.chosen_losses)]
    update: Weights = {}
    for choice, mask in masks(of_masks, one.full, one.tokenizer, one.rows, lambda: one.retain_only, missing):
        for loss in config.chosen_losses:
            if (choice.name, loss) in done:
                continue
            with restored(one.full, mask) as start:
                if loss == INFLUENCE:
                    update = update or whole_update(one)
                    more = {"steps": 1, "lr": math.nan, "eta": one_shot(one, mask, update, start, goal)}
                else:
                    more = {**_trained(config, one, mask, loss, goal, start), "eta": math.nan}
                scores = score(one.full)
            yield record(choice.name, loss, scores, {"selected_parameters": mask.count, **more})
    if other is not None and (OTHER_SEED, NO_LOSS) not in done:
        scores = score(load_model(str(other().retain_only), device="cpu"))
        yield record(OTHER_SEED, NO_LOSS, scores, untouched)


class restored:
    """Gives the selected tensors of a model as they are on entry, and puts them back on exit."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if name in mask}

    def __enter__(self) -> Weights:
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        return self._start

    def __exit__(self, *raised: object) -> None:
        put(self._parameters, self._start)


def put(parameters: dict[str, nn.Parameter], values: Weights) -> None:
    """Writes values into parameters of the same names."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def between(tried: dict[float, Record]) -> float | None:
    """The rate half way, by factors, from one that did not reach the goal to the next, which shot past it; else None.

    Args:
        tried: as `next_rate` takes them, when that has no rate to try any more.
    """
    reached = [rate for rate, run in tried.items() if not math.isnan(run[AT_LEVELS[-1]])]
    short = [rate for rate in tried if rate not in reached]
    if not reached or not short or any(tried[rate]["steps"] >= FEW_STEPS for rate in reached):
        return None
    low, high = max(short), min(reached)
    return None if high <= 2.0 * low else math.sqrt(low * high)


def _trained(
    config: ForgetQualityConfig, one: Pair, mask: Mask, loss: str, goal: float, start: Weights
) -> dict[str, Any]:
    """Unlearns at the rates of the study of masks and leaves the model with the best of the runs.

    Best is what reached the goal, in enough steps to have stopped near it, at the lowest retain loss; where none did,
    what came closest.
    """
    parameters = {name: p for name, p in one.full.named_parameters() if name in mask}
    forget, retain = ([row.fields for row in one.rows[name]] for name in ("forget", "retain"))
    tried: dict[float, Record] = {}
    best: tuple[tuple[bool, bool, float], dict[str, Any], Weights] | None = None
    while (rate := next_rate(tried) or between(tried)) is not None:
        put(parameters, start)
        result = unlearn_model(
            one.full, one.tokenizer, forget, retain, mask=mask, loss=loss, lr=rate, batch_size=config.batch_size,
            max_steps=config.max_steps, eval_every=config.eval_every, eval_retain=config.eval_retain,
            stop_forget_loss=goal, seed=one.seed,
        )  # fmt: skip
        assert result.verification.outside_mask_bit_equal
        reached, after = result.after.forget >= goal, result.after
        tried[rate] = {"steps": result.steps, AT_LEVELS[-1]: after.retain if reached else math.nan}
        order = (not reached, result.steps < FEW_STEPS, after.retain if reached else -after.forget)
        if best is None or order < best[0]:
            kept = {name: p.detach().clone() for name, p in parameters.items()}
            best = order, {"steps": result.steps, "lr": rate}, kept
    assert best is not None
    put(parameters, best[2])
    return best[1]
