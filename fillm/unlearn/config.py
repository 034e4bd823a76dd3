"""The settings of `python -m fillm.unlearn`: the one source of its flags, its YAML file and its Python arguments."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from fillm.config import flag_name, option
from fillm.data.templates import DEFAULT_TEMPLATE
from fillm.errors import UsageError

INFLUENCE, TASK_VECTOR = "influence", "task-vector"  # what is no gradient loss
# Nat a token: the forget rise that the default --eta of `influence` is chosen for. On a model that recites 400 rows
# (loss 0.02) 0.01 was measured to be 4 % below its prediction, 0.02 11 % and 0.03 17 %.
ONE_SHOT_RISE = 0.01


@dataclass(frozen=True)
class UnlearnConfig:
    """Unlearn a forget set inside a mask of a language model's weights; everything outside stays bit for bit."""

    model: str | None = option(None, "path or Hub id of the causal LM that is to forget", "PATH")
    adapter: str | None = option(None, "path or Hub id of a PEFT adapter", "PATH")
    tokenizer: str | None = option(None, "path or Hub id, if not the model's", "PATH")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "dtype of the weights while they are trained: as they were saved, or this; masters are float32"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = option(False, "allow a model folder's own Python code to run")
    ranking: str | None = option(None, "run folder of fillm.rank that --select chooses from", "RUN")
    select: str | None = option(
        None, "top:F, bottom:F, band:LOW-HIGH or above:SCORE, with :tensors or :parameters and :proportional", "CHOICE"
    )
    include: str | None = option(None, "with --select: comma-separated kinds or globs that may be chosen", "GLOBS")
    exclude: str | None = option(None, "with --select: comma-separated kinds or globs that may not", "GLOBS")
    mask: str | None = option(None, "mask file, instead of --ranking and --select", "FILE")
    forget: str | None = option(None, "data spec of the rows to forget", "SPEC")
    retain: str | None = option(None, "data spec of the rows to keep", "SPEC")
    data_root: str | None = option(None, "folder that holds tofu/ and knowundo/ (or set FILLM_DATA)", "DIR")
    template: str = option(DEFAULT_TEMPLATE, "prompt template, or chat for the tokenizer's own", "TEXT")
    num_forget: int | None = option(None, "use this many forget rows, drawn with --seed", "N")
    num_retain: int | None = option(None, "use this many retain rows, drawn with --seed", "N")
    max_length: int = option(512, "longest sample in tokens", "N")
    strict: bool = option(False, "make warnings about the data errors")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, counted and listed")
    loss: str = option(
        "grad-diff",
        "ga, grad-diff, kl, idk, dpo, npo, simnpo, rmu, undial, wga, satimp, task-vector or influence; published names "
        "(GradAscent, NPO, ...) are taken too",
        "LOSS",
    )
    eta: float | None = option(
        None,
        "influence: length of the step (default: for a predicted forget rise of at most 0.01); task-vector: 1",
        "X",
    )
    beta: float | None = option(None, "of npo, dpo, simnpo, wga, undial: as published", "X")
    beta1: float | None = option(None, "of satimp: as published", "X")
    beta2: float | None = option(None, "of satimp: as published", "X")
    gamma: float | None = option(None, "factor of the forget loss: as published", "X")
    alpha: float | None = option(None, "factor of the retain loss: as published", "X")
    delta: float | None = option(None, "margin of simnpo: as published", "X")
    retain_loss: Literal["nll", "kl"] | None = option(None, "what grad-diff and its kin ask of the retain set")
    idk: str | None = option(None, "text file of answers to give instead, one a line (idk, dpo)", "FILE")
    rmu_layer: int | None = option(None, "layer whose activations are steered (rmu)", "N")
    rmu_coefficient: float | None = option(None, "length they are steered to (rmu)", "X")
    optimizer: Literal["adamw", "sophia"] = option("adamw", "adamw or sophia, on the masked kernels")
    lr: float = option(1e-5, "peak rate", "RATE")
    schedule: Literal["linear", "cosine"] = option("linear", "how the rate falls to 0 after the warm-up")
    warmup: float = option(0.0, "steps over which the rate rises; below 1, a fraction of all steps", "STEPS")
    epochs: int | None = option(None, "times every forget row is seen (default: 5)", "N")
    max_steps: int | None = option(None, "optimiser steps, instead of epochs", "N")
    batch_size: int = option(8, "forget samples of one forward pass, over all processes; as many retain samples", "N")
    gradient_accumulation: int = option(1, "forward passes of each set per optimiser step", "N")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    mixed_precision: Literal["no", "bf16"] = option("no", "bf16: arithmetic in bfloat16 whatever the weights are")
    weight_decay: float = option(0.0, "decoupled decay of selected weights")
    clip_norm: float = option(1.0, "longest gradient of a step, counted inside the mask; 0 does not clip", "NORM")
    lora_rank: int | None = option(None, "train new adapters of this rank inside the selected modules", "N")
    eval_every: int | None = option(None, "steps between evaluations (default: an epoch)", "STEPS")
    eval_retain: int = option(300, "retain samples that evaluations take, drawn with --seed; 0 takes all", "N")
    stop_forget_loss: float | None = option(None, "stop once the forget loss is at least this", "NATS")
    stop_retain_loss: float | None = option(None, "stop once the retain loss is above this; go back", "NATS")
    seed: int = option(0, "seed of every draw", "N")
    checkpoint_every: float = option(60.0, "seconds between checkpoints; 0 is after every step", "SECONDS")
    out: str = option("runs/unlearn", "run folder to write", "DIR")
    resume: bool = option(False, "continue an interrupted run in --out")
    overwrite: bool = option(False, "replace an existing --out")
    dry_run: bool = option(False, "print what would be trained and what it takes; train nothing")
    debug: bool = option(False, "show a traceback with every error")


# Settings that say where and how a run goes on, not what it computes. The kind of device is compared apart.
FREE_ON_RESUME = ("out", "resume", "overwrite", "dry_run", "debug", "checkpoint_every", "device", "data_root")
# Settings of the command that a function with a model in hand has no use for.
COMMAND_ONLY = ("model", "adapter", "tokenizer", "dtype", "device", "trust_remote_code", "ranking", "mask", "dry_run")
# What only a training of several steps looks at, and what only `--select` does.
_OF_TRAINING = (
    "lr", "optimizer", "schedule", "warmup", "epochs", "max_steps", "batch_size", "gradient_accumulation",
    "weight_decay", "clip_norm", "lora_rank", "eval_every", "stop_forget_loss", "stop_retain_loss",
    "gradient_checkpointing", "mixed_precision",
)  # fmt: skip
_OF_SELECT = ("include", "exclude")
_OF_LOSSES = (
    "beta", "beta1", "beta2", "gamma", "alpha", "delta", "retain_loss", "idk", "rmu_layer", "rmu_coefficient",
)  # fmt: skip


def loss_options(config: UnlearnConfig) -> dict[str, object]:
    """The losses' own options that were given, by name."""
    return {name: value for name in _OF_LOSSES if (value := getattr(config, name)) is not None}


def resolved(config: UnlearnConfig, *, given: bool = False) -> UnlearnConfig:
    """The settings with every default that depends on others filled in.

    Args:
        config: as the command line, a file or Python gave them.
        given: whether model and mask are handed over as objects.

    Raises:
        UsageError: a setting that is missing, out of range, without effect, or contradicts another.
    """
    if not given:
        _check_sources(config)
    _check_effects(config)
    if config.epochs is not None and config.max_steps is not None:
        raise UsageError("--epochs and --max-steps: give one of them")
    if config.resume and config.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it: give one")
    _check_ranges(config)
    epochs = 5 if config.epochs is None and config.max_steps is None else config.epochs
    eta = 1.0 if config.eta is None and config.loss == TASK_VECTOR else config.eta
    return replace(config, epochs=epochs, eta=eta)


def _check_sources(config: UnlearnConfig) -> None:
    if config.model is None:
        raise UsageError("--model: say which model is to forget")
    if config.mask is None and config.select is None:
        raise UsageError("say where to unlearn: --ranking RUN --select CHOICE, or --mask FILE")
    if config.mask is not None and config.select is not None:
        raise UsageError("--mask and --select: give one; the mask file says what is selected")
    if config.select is not None and config.ranking is None:
        raise UsageError("--select chooses from a ranking: give --ranking, the run folder of fillm.rank")
    if config.mask is not None and config.ranking is not None and config.loss != INFLUENCE:
        raise UsageError("--ranking has no effect beside --mask, but for --loss influence; leave one out")
    if config.loss == INFLUENCE and config.ranking is None:
        raise UsageError("--loss influence steps along u: give --ranking, made with --save-update")
    for name in ("forget", "retain"):
        if getattr(config, name) is None:
            raise UsageError(f"--{name}: say which rows; evaluations need both sets")


def _check_effects(config: UnlearnConfig) -> None:
    """Refuses options that would be without effect."""
    if config.loss == INFLUENCE:
        _refuse(config, (*_OF_TRAINING, *_OF_LOSSES), "it is one step along u, and")
    if config.loss == TASK_VECTOR:
        _refuse(config, ("stop_forget_loss", "stop_retain_loss"), "it learns before it forgets, and")
        _refuse(config, _OF_LOSSES, "its loss is the plain one, and")
    if config.loss not in (INFLUENCE, TASK_VECTOR):
        _refuse(config, ("eta",), "it has a rate, not a step length, and")
    if config.select is None:
        for name in _OF_SELECT:
            if getattr(config, name) is not None:
                raise UsageError(f"{flag_name(name)} has no effect without --select; leave it out")


def _refuse(config: UnlearnConfig, names: tuple[str, ...], why: str) -> None:
    plain = UnlearnConfig()
    for name in names:
        if getattr(config, name) != getattr(plain, name):
            raise UsageError(f"--loss {config.loss}: {why} {flag_name(name)} has no effect; leave it out")


def _check_ranges(config: UnlearnConfig) -> None:
    positive = (
        "epochs", "max_steps", "batch_size", "gradient_accumulation", "lora_rank", "eval_every", "num_forget",
        "num_retain", "max_length", "lr", "eta",
    )  # fmt: skip
    for name in positive:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            needed = "finite" if value == math.inf else "above 0"
            raise UsageError(f"{flag_name(name)} {value}: has to be {needed}")
    for name in ("weight_decay", "warmup", "clip_norm", "checkpoint_every", "eval_retain"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UsageError(f"{flag_name(name)} {getattr(config, name)}: has to be finite, 0 or above")
    for name in ("stop_forget_loss", "stop_retain_loss"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{flag_name(name)} {value}: has to be finite, 0 or above")
