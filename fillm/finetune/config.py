"""The settings of `python -m fillm.finetune`."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from fillm.config import option
from fillm.data.templates import DEFAULT_TEMPLATE
from fillm.errors import UsageError


@dataclass(frozen=True)
class FinetuneConfig:
    """Makes the model that is to forget: trains a new or a given causal language model on a data spec."""

    architecture: str | None = option(
        None, "a new model: tiny (1.3M), small (5.3M) or a config.json", "tiny|small|PATH"
    )
    vocab_size: int | None = option(None, "tokens of a new model's tokenizer (default: as the architecture says)", "N")
    model: str | None = option(None, "train this model instead of a new one", "PATH_OR_HUB_ID")
    tokenizer: str | None = option(None, "tokenizer, where it is not the model's own or a new one", "PATH_OR_HUB_ID")
    trust_remote_code: bool = option(False, "let Python code that comes with the model run")
    data: str | None = option(None, "what the model learns", "SPEC")
    eval_data: str | None = option(None, "measure the loss on these rows after every epoch", "SPEC")
    data_root: str | None = option(None, "folder for tofu: and knowundo:", "DIR")
    template: str = option(DEFAULT_TEMPLATE, "how question and answer become text, or chat")
    max_length: int = option(512, "most tokens of a sample", "N")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used and list them")
    epochs: int | None = option(None, "times every row is seen (default: 30 for a new model, 5 for a given one)", "N")
    max_steps: int | None = option(None, "optimiser steps, instead of epochs", "N")
    target_loss: float | None = option(None, "stop when an epoch's mean training loss is below this", "NATS")
    lr: float | None = option(None, "peak rate (default: new 3e-3, given 1e-5, LoRA 2e-4)", "RATE")
    schedule: Literal["cosine", "linear"] = option("cosine", "how the rate falls to 0 after the warm-up")
    warmup: float = option(0.05, "steps over which the rate rises; below 1, a fraction of all steps", "STEPS")
    batch_size: int = option(16, "samples in one forward pass", "N")
    gradient_accumulation: int = option(1, "forward passes per optimiser step", "N")
    weight_decay: float = option(0.0, "decoupled decay of matrices; vectors never decay")
    clip_norm: float = option(1.0, "longest gradient of a step; 0 does not clip", "NORM")
    lora_rank: int | None = option(None, "train low-rank adapters of this rank; saved merged and in adapter/", "N")
    dtype: Literal["float32", "bfloat16"] = option("float32", "arithmetic and saved weights; masters are float32")
    device: str = option("auto", "auto, cpu, cuda or cuda:i")
    seed: int = option(0, "of new weights, sample order and dropout")
    checkpoint_every: float = option(60.0, "seconds between checkpoints; 0 is after every step", "SECONDS")
    out: str | None = option(None, "folder of the finished model", "DIR")
    resume: bool = option(False, "continue an interrupted run of the same settings")
    overwrite: bool = option(False, "replace a finished run, discard an interrupted one")
    debug: bool = option(False, "show tracebacks")


# What may differ between an interrupted run and the one that continues it: none of it changes a weight. The kind of
# device does, and is compared apart: `auto` and `cpu` may be one.
FREE_ON_RESUME = frozenset({"out", "resume", "overwrite", "debug", "checkpoint_every", "device", "data_root"})


def resolved(config: FinetuneConfig) -> FinetuneConfig:
    """The settings with every default that depends on others filled in.

    Raises:
        UsageError: a setting that is missing, out of range, or contradicts another.
    """
    if not config.out:
        raise UsageError("--out: say where the model is to be saved")
    if not config.data:
        raise UsageError("--data: say what the model is to learn, for instance --data fictional-small:full")
    if (config.model is None) == (config.architecture is None):
        raise UsageError("give either --architecture tiny|small|PATH for a new model or --model for a given one")
    if config.model is not None and config.vocab_size is not None:
        raise UsageError("--vocab-size belongs to --architecture: a given --model has its tokenizer already")
    if config.vocab_size is not None and config.tokenizer is not None:
        raise UsageError("--vocab-size and --tokenizer: give one; a given tokenizer has its size")
    if config.epochs is not None and config.max_steps is not None:
        raise UsageError("--epochs and --max-steps: give one of them")
    new = config.model is None
    rate = 3e-3 if new else 1e-5
    if config.lora_rank is not None and not new:
        rate = 2e-4
    epochs = config.epochs
    if epochs is None and config.max_steps is None:
        epochs = 30 if new else 5
    config = replace(config, epochs=epochs, lr=rate if config.lr is None else config.lr)
    counts = ("epochs", "max_steps", "batch_size", "gradient_accumulation", "lora_rank", "vocab_size")
    for name in (*counts, "lr", "target_loss"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} {value}: has to be above 0")
    for name in ("weight_decay", "warmup", "clip_norm", "checkpoint_every"):
        if not getattr(config, name) >= 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)}: has to be 0 or above")
    for name in ("lr", "target_loss", "weight_decay", "warmup"):
        if getattr(config, name) == math.inf:
            raise UsageError(f"--{name.replace('_', '-')} inf: has to be finite")
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite: give one of them")
    return config
