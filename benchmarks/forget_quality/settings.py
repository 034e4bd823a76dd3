"""The settings of `python -m benchmarks.forget_quality`."""

import math
from dataclasses import dataclass

from benchmarks.part import check_part, part_of
from fillm.config import flag_name, option
from fillm.errors import UsageError
from fillm.unlearn.config import INFLUENCE

PROGRAM = "python -m benchmarks.forget_quality"
LOSSES = ("ga", "grad-diff", "npo", "simnpo", INFLUENCE)
# Ways to choose the mask, by their names in `benchmarks.unlearning`.
CHOICES = ("whole model", "random 0", "soir top", "soir bottom", "soir --objective retain")
QUICK_RISE = 0.1  # nats a token: a model that recites nothing is to forget this much all the same


@dataclass(frozen=True)
class ForgetQualityConfig:
    """Unlearns to one forget loss by every method, and scores all beside the model that never saw the rows."""

    data_root: str | None = option(None, "folder that holds tofu/ (or set FILLM_DATA); else fictional authors", "DIR")
    seeds: int = option(3, "pairs of models, each with its own initial weights and order of rows", "N")
    losses: str = option(",".join(LOSSES), "comma-separated losses", "LOSSES")
    choices: str | None = option(None, "comma-separated names of choices to try (default: all)", "NAMES")
    forget_loss: float = option(3.0, "unlearn until the forget loss is this; 0: the retain-only model's own", "NATS")
    fraction: float = option(0.1, "of the parameters of MLP and attention tensors that a mask takes", "X")
    batch_size: int = option(10, "forget samples of a step, and as many retain samples", "N")
    max_steps: int = option(30, "optimiser steps, after which a run that has not forgotten ends", "N")
    eval_every: int = option(1, "steps between the evaluations at which a run may stop", "STEPS")
    eval_retain: int = option(20, "retain samples whose loss is measured while unlearning", "N")
    score_retain: int = option(80, "retain rows that are scored, evenly spread; all forget rows are", "N")
    max_new_tokens: int = option(100, "longest generated answer in tokens", "N")
    part: str | None = option(None, "I/N: only every Nth choice from the Ith (1-based), to share the work", "I/N")
    threads: int | None = option(None, "torch threads (default: torch's own choice)", "N")
    minutes: float | None = option(None, "stop after this long; --resume goes on (default: no bound)", "X")
    quick: bool = option(False, "tiny models, two choices, two losses: whether it runs at all")
    resume: bool = option(False, "keep what an interrupted run with the same settings has finished")
    out: str = option("benchmarks/results", "folder for forget_quality.csv", "DIR")
    debug: bool = option(False, "show a traceback with every error")

    @property
    def chosen_losses(self) -> list[str]:
        """The losses, in the order given."""
        return ["ga", INFLUENCE] if self.quick else _words(self.losses)

    @property
    def chosen_choices(self) -> list[str]:
        """The names of the choices of this part of the work, in their order."""
        wanted = CHOICES if self.choices is None else _words(self.choices)
        found = [name for name in CHOICES if name in (("whole model", "soir bottom") if self.quick else wanted)]
        return part_of(found, self.part)


def check(config: ForgetQualityConfig) -> None:
    """Refuses what cannot be measured.

    Raises:
        UsageError: naming the option.
    """
    for flag, given, there in (("--losses", config.losses, LOSSES), ("--choices", config.choices, CHOICES)):
        unknown = [] if given is None else [name for name in _words(given) if name not in there]
        if unknown or (given is not None and not _words(given)):
            raise UsageError(f"{flag} {given}: give some of {', '.join(there)}")
    counts = (
        "seeds", "batch_size", "max_steps", "eval_every", "eval_retain", "score_retain", "max_new_tokens", "threads",
    )  # fmt: skip
    for name in counts:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag_name(name)} {value}: give at least 1")
    check_part(config.part)
    if not 0 <= config.forget_loss < math.inf:
        raise UsageError(f"--forget-loss {config.forget_loss}: has to be finite, 0 or above")
    if not 0 < config.fraction <= 1:
        raise UsageError(f"--fraction {config.fraction}: has to be above 0 and 1 at most")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
