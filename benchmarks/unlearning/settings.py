"""The settings of `python -m benchmarks.unlearning`."""

from dataclasses import dataclass

from benchmarks.part import check_part
from fillm.config import flag_name, option
from fillm.errors import UsageError

PROGRAM = "python -m benchmarks.unlearning"
SCOPE = "mlp,attn"  # tensors that a mask may take
LEVELS = (1.0, 2.0)  # forget losses, in nats a token, at which the retain loss is read
QUICK_LEVELS = (5.0, 5.5)  # of a model that recites nothing
ARCHITECTURES = ("small", "tiny")
LOSSES = ("ga", "grad-diff", "npo")
RATES = (2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2)  # peak rates that may be tried; what counts is the best of those tried
FIRST_RATE = 4e-3


@dataclass(frozen=True)
class UnlearningConfig:
    """Unlearns inside masks of every ranking method, and reads the retain loss at equal forget loss."""

    data_root: str | None = option(None, "folder that holds tofu/ (or set FILLM_DATA); else fictional authors", "DIR")
    architecture: str = option("small", "of the models: small (5.3 million parameters) or tiny (1.3 million)", "NAME")
    seeds: int = option(3, "models, each with its own initial weights and order of rows", "N")
    losses: str = option("ga,grad-diff,npo", "comma-separated losses", "LOSSES")
    choices: str | None = option(None, "comma-separated names of choices to try (default: all)", "NAMES")
    fraction: float = option(0.1, "of the parameters of MLP and attention tensors that a mask takes", "X")
    draws: int = option(5, "random masks of every model", "N")
    batch_size: int = option(20, "forget samples of a step, and as many retain samples", "N")
    max_steps: int = option(60, "optimiser steps, after which a run that has not forgotten is given up", "N")
    eval_every: int = option(2, "steps between evaluations; the losses between them are taken to lie on lines", "STEPS")
    eval_retain: int = option(60, "retain samples whose loss is measured", "N")
    held_out: bool = option(False, "rank by every second retain row, and keep and measure the others alone")
    part: str | None = option(None, "I/N: only every Nth choice from the Ith (1-based), to share the work", "I/N")
    threads: int | None = option(None, "torch threads (default: torch's own choice)", "N")
    minutes: float | None = option(None, "stop after this long; --resume goes on (default: no bound)", "X")
    quick: bool = option(False, "a tiny model, three choices, one loss: whether it runs at all")
    resume: bool = option(False, "keep what an interrupted run with the same settings has finished")
    out: str = option("benchmarks/results", "folder for unlearning.csv and unlearning.png", "DIR")
    debug: bool = option(False, "show a traceback with every error")

    @property
    def chosen_losses(self) -> list[str]:
        """The losses, in the order given."""
        return ["ga"] if self.quick else [word.strip() for word in self.losses.split(",") if word.strip()]

    @property
    def levels(self) -> tuple[float, float]:
        """The forget losses at which the retain loss is read, rising."""
        return QUICK_LEVELS if self.quick else LEVELS


def check(config: UnlearningConfig) -> None:
    """Refuses what cannot be measured.

    Raises:
        UsageError: naming the option.
    """
    unknown = [loss for loss in config.chosen_losses if loss not in LOSSES]
    if unknown or not config.chosen_losses:
        raise UsageError(f"--losses {config.losses}: give some of {', '.join(LOSSES)}")
    if config.architecture not in ARCHITECTURES:
        raise UsageError(f"--architecture {config.architecture}: give one of {', '.join(ARCHITECTURES)}")
    for name in ("seeds", "batch_size", "max_steps", "eval_every", "eval_retain", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag_name(name)} {value}: give at least 1")
    check_part(config.part)
    if not 0 < config.fraction <= 1:
        raise UsageError(f"--fraction {config.fraction}: has to be above 0 and 1 at most")
