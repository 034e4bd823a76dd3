"""From settings to a finished model folder."""

import dataclasses
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fillm.config import flag_name, from_mapping
from fillm.data import Row, SampleSet, load_rows, tokenize_rows
from fillm.errors import DataError, ModelError, RunFolderError
from fillm.finetune.architectures import architecture_config, new_model, train_tokenizer, training_texts
from fillm.finetune.checkpoint import LOG_COLUMNS
from fillm.finetune.config import FREE_ON_RESUME, FinetuneConfig, resolved
from fillm.finetune.folder import RunFolder, versions
from fillm.finetune.interruption import signals_noted
from fillm.finetune.schedule import warmup_steps
from fillm.finetune.training import Plan, Training
from fillm.models import DTYPES, load_model, load_tokenizer, model_fingerprint, quiet_transformers, resolve_device

DataLike = str | Sequence[Mapping[str, Any]]  # a datasets.Dataset is such a sequence


@dataclass(frozen=True)
class FinetuneResult:
    """What a training came to.

    Attributes:
        folder: the Hugging Face folder.
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


def run(
    config: FinetuneConfig, data: DataLike | None = None, eval_data: DataLike | None = None, show: bool = True
) -> FinetuneResult:
    """The command: `data` and `eval_data` stand for the specs of that name where they are given."""
    config = resolved(config)
    device = resolve_device(config.device)
    rows = _rows(config.data if data is None else data, config)
    eval_rows = None
    if config.eval_data is not None:
        eval_rows = _rows(config.eval_data if eval_data is None else eval_data, config)
    folder = RunFolder(str(config.out))
    folder.open(config.resume, config.overwrite)
    record = folder.record()
    if record is not None:
        _check_same_settings(record, config, folder.partial)
        if "result" in record:  # died between its last file and its name
            folder.publish()
            return _result(record, folder.out)
    model, tokenizer = _model_and_tokenizer(config, rows, folder, begun=record is not None)
    samples = _samples(rows, tokenizer, config, model)
    eval_samples = None if eval_rows is None else _samples(eval_rows, tokenizer, config, model)
    started = {
        "replaces": config.overwrite if record is None else record.get("replaces", False),
        # Flags about what lay in the folder are not part of what a replay repeats.
        "settings": {**dataclasses.asdict(config), "resume": False, "overwrite": False, "debug": False},
        "fingerprints": {
            "data": samples.fingerprint,
            "eval_data": None if eval_samples is None else eval_samples.fingerprint,
            "initial_model": model_fingerprint(model),
        },
    }
    if record is None:
        with quiet_transformers():
            tokenizer.save_pretrained(folder.partial)
        folder.write_record(started)
    elif record.get("fingerprints") != started["fingerprints"]:
        differs = [k for k, v in started["fingerprints"].items() if record.get("fingerprints", {}).get(k) != v]
        raise RunFolderError(
            f"{folder.partial}: {', '.join(differs)} changed since it began; start anew with --overwrite"
        )
    return _train(config, model, samples, eval_samples, device, folder, started, show)


def _train(
    config: FinetuneConfig,
    model: PreTrainedModel,
    samples: SampleSet,
    eval_samples: SampleSet | None,
    device: torch.device,
    folder: RunFolder,
    started: dict[str, Any],
    show: bool,
) -> FinetuneResult:
    dtype = DTYPES[config.dtype]
    trained = _prepare(model, config).to(device)
    training = Training(trained, samples, _plan(config, len(samples)), folder.checkpoint, device, eval_samples)
    if show:
        _say_what(samples, eval_samples, trained, training, device)
    with signals_noted() as interrupted:
        training.run(interrupted, show)
    fingerprint = _save_model(trained, dtype, folder.partial)
    folder.write_log(training.progressed.log)
    losses, last = training.epoch_losses, training.progressed.log[-1]
    record = {
        **started,
        "fingerprints": {**started["fingerprints"], "model": fingerprint},
        "result": {
            "loss": losses[-1],
            "eval_loss": None if eval_samples is None else last[LOG_COLUMNS.index("eval_loss")],
            "epoch_losses": losses,
            "steps": training.progressed.step,
            "samples": len(samples),
            "tokens_per_epoch": samples.num_tokens,
            "parameters": sum(p.numel() for p in trained.parameters()),
            "batch_size_that_fitted": training.progressed.micro_batch,
            "seconds": last[LOG_COLUMNS.index("seconds")],
        },
        "skipped_rows": [f"{where}: {why}" for where, why in samples.skipped],
        "device": str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    folder.write_record(record)
    folder.publish()
    return _result(record, folder.out)


def _rows(data: Any, config: FinetuneConfig) -> list[Row]:
    return load_rows(data, data_root=config.data_root, skip_bad_rows=config.skip_bad_rows)


def _samples(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig, model: PreTrainedModel
) -> SampleSet:
    samples = tokenize_rows(
        rows,
        tokenizer,
        template=config.template,
        max_length=config.max_length,
        skip_bad_rows=config.skip_bad_rows,
    )
    vocabulary = model.get_input_embeddings().num_embeddings
    for sample in samples:
        if max(sample.input_ids) >= vocabulary:
            raise DataError(f"{sample.id}: token {max(sample.input_ids)} is none of the model's {vocabulary}")
    longest, positions = max(samples.lengths), getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise DataError(f"{samples.source}: {longest} tokens, the model has {positions} positions; lower --max-length")
    return samples


def _model_and_tokenizer(
    config: FinetuneConfig, rows: list[Row], folder: RunFolder, begun: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model before its first step (on the CPU, float32) and its tokenizer."""
    trust = config.trust_remote_code
    if config.model is not None:
        model = load_model(config.model, device="cpu", trust_remote_code=trust)
        return model, load_tokenizer(config.tokenizer or config.model, trust_remote_code=trust)
    architecture = architecture_config(str(config.architecture))
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=trust)
    elif begun:
        tokenizer = load_tokenizer(str(folder.partial))
    else:
        size = config.vocab_size or architecture.vocab_size
        tokenizer = train_tokenizer(training_texts(rows, config.template), size)
    return new_model(architecture, tokenizer, config.seed), tokenizer


def _prepare(model: PreTrainedModel, config: FinetuneConfig) -> Any:
    """What is trained is float32 and requires grad; what is frozen has the dtype of the arithmetic."""
    model.requires_grad_(config.lora_rank is None)
    if config.lora_rank is None:
        return model.float()
    try:
        import peft
    except ImportError:
        raise ModelError("--lora-rank needs the package peft; pip install 'fillm[peft]'") from None
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft reads what transformers has deprecated
        torch.manual_seed(config.seed)
        wrapped = peft.get_peft_model(model.to(DTYPES[config.dtype]), settings)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def _plan(config: FinetuneConfig, num_samples: int) -> Plan:
    per_step = config.batch_size * config.gradient_accumulation
    steps = config.max_steps or int(config.epochs or 0) * -(-num_samples // per_step)
    return Plan(
        steps=steps,
        samples_per_step=per_step,
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
    try:
        with quiet_transformers():
            if hasattr(trained, "merge_and_unload"):
                trained.save_pretrained(folder / "adapter")
                trained = trained.merge_and_unload()
            trained = trained.to(device="cpu", dtype=dtype)
            trained.save_pretrained(folder)
    except OSError as error:
        raise RunFolderError(f"{folder}: the model cannot be saved ({error}); free some disk, then --resume") from None
    return model_fingerprint(trained)


def _check_same_settings(record: Mapping[str, Any], config: FinetuneConfig, partial: Path) -> None:
    now, then = dataclasses.asdict(config), record["settings"]
    differs = [name for name in now if name not in FREE_ON_RESUME and then.get(name) != now[name]]
    if differs:
        name = differs[0]
        raise RunFolderError(
            f"{partial}: was begun with {flag_name(name)} {then.get(name)}, not {now[name]}; "
            "give the same settings, or start anew with --overwrite"
        )


def _say_what(
    samples: SampleSet, eval_samples: SampleSet | None, model: Any, training: Training, device: torch.device
) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held_out = f", {len(eval_samples)} to evaluate" if eval_samples is not None else ""
    resumed = f", continued at step {training.progressed.step}" if training.progressed.step else ""
    print(
        f"{trained:,} parameters on {device}; {len(samples)} samples, {samples.num_tokens:,} tokens{held_out}; "
        f"{training.plan.steps} steps{resumed}",
        file=sys.stderr,
    )
    for where, why in samples.skipped:
        print(f"skipped {where}: {why}", file=sys.stderr)


def _result(record: Mapping[str, Any], folder: Path) -> FinetuneResult:
    result = record["result"]
    return FinetuneResult(
        folder=folder,
        loss=result["loss"],
        eval_loss=result["eval_loss"],
        epoch_losses=list(result["epoch_losses"]),
        steps=result["steps"],
        seconds=result["seconds"],
        fingerprint=record["fingerprints"]["model"],
    )
