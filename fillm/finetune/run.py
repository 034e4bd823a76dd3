"""From settings to a finished model folder."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fillm.config import flag_name, from_mapping
from fillm.data import Reading, Row, SampleSet, check_fits_model
from fillm.data.reading import DataLike, skipped_lines
from fillm.finetune.architectures import architecture_config, new_model, train_tokenizer, training_texts
from fillm.finetune.config import FREE_ON_RESUME, FinetuneConfig, resolved
from fillm.finetune.log import LOG_COLUMNS, write_log
from fillm.finetune.schedule import warmup_steps
from fillm.finetune.training import Plan, Training
from fillm.models import (
    DTYPES,
    load_model,
    load_tokenizer,
    model_fingerprint,
    quiet_transformers,
    resolve_device,
    save_tokenizer,
    with_lora,
)
from fillm.runs import RunFolder, check_inputs_outside, run_identity, run_record, signals_noted, write_record
from fillm.runs.memory import memory_explained


@dataclass(frozen=True)
class FinetuneResult:
    """What a training came to.

    Attributes:
        folder: the Hugging Face folder, an absolute path.
        loss: mean training loss of the last epoch, nats a token, mean over samples of each sample's mean.
        eval_loss: loss on the evaluation data after the last epoch, None without them.
        epoch_losses: `loss` of every epoch.
        steps: optimiser steps taken.
        seconds: of training, those before an interruption included.
        fingerprint: `fillm.models.model_fingerprint` of the saved weights.
    """

    folder: Path
    loss: float
    eval_loss: float | None
    epoch_losses: list[float]
    steps: int
    seconds: float
    fingerprint: str


def finetune_model(
    data: DataLike, *, out: str, eval_data: DataLike | None = None, show: bool = True, **settings: Any
) -> FinetuneResult:
    """Trains a new or a given causal language model and saves it as a Hugging Face folder.

    Args:
        data: a data spec, a `datasets.Dataset` or a sequence of rows.
        out: the folder; it appears whole, or `out.partial` holds what a later `resume=True` continues.
        eval_data: the same as `data`; its loss is measured after every epoch.
        show: whether progress is shown on stderr.
        **settings: fields of `FinetuneConfig`: `architecture` or `model`, `epochs`, `lr`, ...

    Raises:
        UsageError, DataError, ModelError, RunFolderError, NumericsError, OutOfMemoryError: see docs/finetune.md.
        InterruptedRun: SIGINT or SIGTERM; the state is saved.
    """
    named = {"data": data if isinstance(data, str) else "rows", "out": str(out)}
    if eval_data is not None:
        named["eval_data"] = eval_data if isinstance(eval_data, str) else "rows"
    return run(from_mapping(FinetuneConfig, {**settings, **named}), data, eval_data, show)


@memory_explained("give a smaller model, or --lora-rank")
def run(
    config: FinetuneConfig, data: DataLike | None = None, eval_data: DataLike | None = None, show: bool = True
) -> FinetuneResult:
    """The command: `data` and `eval_data` stand for the specs of that name where they are given."""
    config = resolved(config)
    check_inputs_outside(config)
    device = resolve_device(config.device)

    def tell(line: str) -> None:
        if show:
            print(line, file=sys.stderr, flush=True)

    reading = Reading(config, lambda line: tell(f"warning: {line}"))
    given = {"data": config.data if data is None else data}
    if config.eval_data is not None:
        given["eval_data"] = config.eval_data if eval_data is None else eval_data
    rows = {which: reading.rows(one, flag_name(which)) for which, one in given.items()}
    # Before a model is loaded; rows that are left out when they are tokenised can only make the run shorter.
    warmup_steps(config.warmup, _steps(config, len(rows["data"])))
    with RunFolder(str(config.out), overwrite=config.overwrite, resume=config.resume, notice=tell) as folder:
        model, tokenizer = _model_and_tokenizer(config, rows["data"])
        sets = {which: reading.samples(some, tokenizer, flag_name(which)) for which, some in rows.items()}
        for which, samples in sets.items():
            check_fits_model(samples, model, flag_name(which))
        fingerprints = {
            "data": sets["data"].fingerprint,
            "eval_data": sets["eval_data"].fingerprint if "eval_data" in sets else None,
            "initial_model": model_fingerprint(model),
        }
        # The order of a sum depends on the device and on the number of threads, and with it the last bits.
        machine = {"device": device.type, "threads": str(torch.get_num_threads())}
        folder.check_identity({**run_identity(config, fingerprints, FREE_ON_RESUME), **machine})
        record = run_record(config, fingerprints, skipped_lines(sets.values()), device)
        trained = _prepare(model, config).to(device)
        plan = _plan(config, len(sets["data"]))
        training = Training(trained, sets["data"], plan, folder, device, sets.get("eval_data"))
        tell(_what_is_trained(sets, trained, training, device))
        with signals_noted() as interrupted:
            training.run(interrupted, show)
        return folder.finish(lambda path: _write(path, folder.out, config, training, tokenizer, record))


def _write(
    path: Path,
    out: Path,
    config: FinetuneConfig,
    training: Training,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
) -> FinetuneResult:
    """The files of the finished folder into `path`, which is to be `out`."""
    log, losses = training.progressed.log, training.epoch_losses
    save_tokenizer(tokenizer, path)
    fingerprint = _save_model(training.model, DTYPES[config.dtype], path)
    write_log(log, path)
    result = FinetuneResult(
        folder=out,
        loss=losses[-1],
        eval_loss=None if config.eval_data is None else log[-1][LOG_COLUMNS.index("eval_loss")],
        epoch_losses=losses,
        steps=training.progressed.step,
        seconds=training.seconds,
        fingerprint=fingerprint,
    )
    told = {
        "loss": result.loss,
        "eval_loss": result.eval_loss,
        "epoch_losses": result.epoch_losses,
        "steps": result.steps,
        "samples": len(training.samples),
        "tokens_per_epoch": training.samples.num_tokens,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "batch_size_that_fitted": training.progressed.micro_batch,
        "seconds": result.seconds,
    }
    fingerprints = {**record["fingerprints"], "model": fingerprint}
    write_record(path, {**record, "fingerprints": fingerprints, "result": told})
    return result


def _model_and_tokenizer(config: FinetuneConfig, rows: list[Row]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model before its first step (on the CPU, float32) and its tokenizer."""
    trust = config.trust_remote_code
    if config.model is not None:
        model = load_model(config.model, device="cpu", trust_remote_code=trust)
        source, flag = (config.tokenizer, "--tokenizer") if config.tokenizer else (config.model, "--model")
        return model, load_tokenizer(source, trust_remote_code=trust, option=flag)
    architecture = architecture_config(str(config.architecture))
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=trust, option="--tokenizer")
    else:
        size = config.vocab_size or architecture.vocab_size
        tokenizer = train_tokenizer(training_texts(rows, config.template), size)
    return new_model(architecture, tokenizer, config.seed), tokenizer


def _prepare(model: PreTrainedModel, config: FinetuneConfig) -> Any:
    """What is trained is float32 and requires grad; what is frozen has the dtype of the arithmetic."""
    model.requires_grad_(config.lora_rank is None)
    if config.lora_rank is None:
        return model.float()
    return with_lora(model.to(DTYPES[config.dtype]), config.lora_rank, config.seed)


def _steps(config: FinetuneConfig, num_samples: int) -> int:
    per_step = config.batch_size * config.gradient_accumulation
    return config.max_steps or int(config.epochs or 0) * -(-num_samples // per_step)


def _plan(config: FinetuneConfig, num_samples: int) -> Plan:
    steps = _steps(config, num_samples)
    return Plan(
        steps=steps,
        samples_per_step=config.batch_size * config.gradient_accumulation,
        batch_size=config.batch_size,
        lr=float(config.lr or 0.0),
        schedule=config.schedule,
        warmup=warmup_steps(config.warmup, steps),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        target_loss=config.target_loss,
        autocast=None if config.dtype == "float32" else DTYPES[config.dtype],
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
    )


def _save_model(trained: Any, dtype: torch.dtype, folder: Path) -> str:
    """config.json and model.safetensors (and the adapter that was trained, in `adapter/`); the fingerprint."""
    with quiet_transformers():
        if hasattr(trained, "merge_and_unload"):
            trained.save_pretrained(folder / "adapter")
            trained = trained.merge_and_unload()
        trained = trained.to(device="cpu", dtype=dtype)
        trained.save_pretrained(folder)
    return model_fingerprint(trained)


def _what_is_trained(sets: Mapping[str, SampleSet], model: Any, training: Training, device: torch.device) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held_out = f", {len(sets['eval_data'])} to evaluate" if "eval_data" in sets else ""
    resumed = f", continued at step {training.progressed.step}" if training.progressed.step else ""
    samples = f"{len(sets['data'])} samples, {sets['data'].num_tokens:,} tokens{held_out}"
    return f"{trained:,} parameters on {device}; {samples}; {training.plan.steps} steps{resumed}"
