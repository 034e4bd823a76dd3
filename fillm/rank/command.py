"""The ranking from start to end: data, model, passes, run folder."""

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fillm_kernels
import pyarrow as pa
import torch
import transformers
from torch import nn

import fillm
from fillm.capture import Capture, verify
from fillm.config import flag_name, from_mapping
from fillm.data import SampleSet, load_rows, shared_rows, take, tokenize_rows
from fillm.errors import DataError, UsageError
from fillm.models import catalogue, load_model, load_tokenizer, model_fingerprint, select_tensors
from fillm.rank.config import FORGET_ALONE, WITHOUT_GRADIENTS, RankConfig, check
from fillm.rank.console import Console
from fillm.rank.default_model import DEFAULT_FORGET, DEFAULT_RETAIN, default_folder, default_model
from fillm.rank.methods import Job, Scores, rank
from fillm.rank.passes import Passes, memory_explained
from fillm.rank.plan import plan_run
from fillm.rank.precision import warn_of_noise
from fillm.rank.ranking import Ranking
from fillm.rank.ranking_files import write_files
from fillm.rank.run_folder import RunFolder

Rows = str | Sequence[Mapping[str, Any]] | Any  # a spec, a datasets.Dataset, or any sequence of rows
# Settings of the command that a function with a model in hand has no use for.
_COMMAND_ONLY = {
    "adapter", "dtype", "device", "trust_remote_code", "gradient_checkpointing", "out", "resume", "overwrite",
    "dry_run", "checkpoint_seconds", "debug",
}  # fmt: skip
# Settings that say where and how a run goes on, not what it computes.
_WHEREABOUTS = ("out", "resume", "overwrite", "dry_run", "debug", "checkpoint_seconds", "data_root")


def rank_parameters(
    model: nn.Module,
    tokenizer: Any,
    forget: Rows,
    retain: Rows = None,
    method: str = "soir",
    *,
    base_model: nn.Module | None = None,
    progress: bool = False,
    **settings: Any,
) -> Ranking:
    """Ranks a model's parameters by what they hold of the forget set.

    Args:
        model: a causal language model; returned as it came (mode, `requires_grad`, weights).
        tokenizer: of the model; None if the rows carry `input_ids` and `labels`.
        forget: a data spec, a `datasets.Dataset` or any sequence of rows.
        retain: the same; not needed by `saliency`, `parameter-shift`, `random` and `none`.
        method: as `--method`.
        base_model: the model before fine-tuning, for `parameter-shift`.
        progress: show progress bars and the warnings on stderr.
        settings: the other fields of `fillm.rank.RankConfig`.

    Returns:
        The ranking, with `u` in `updates` where it was asked for or needed.

    Raises:
        FillmError: one line that says what is wrong, where, and what to do.
    """
    if misplaced := sorted(_COMMAND_ONLY & set(settings)):
        raise UsageError(f"rank_parameters: {', '.join(misplaced)}: a setting of the command, not of this function")
    if base_model is not None and not isinstance(base_model, nn.Module):
        raise UsageError("base_model: give the loaded model, not a path")
    config = from_mapping(RankConfig, {"method": method, **settings}, where="rank_parameters")
    check(dataclasses.replace(config, base_model=config.base_model or ("given" if base_model is not None else None)))
    console = Console() if progress else Console.silent()
    sets = _samples(config, tokenizer, model, forget, retain, console)
    return _rank(config, model, base_model, sets, console, None)


def run(config: RankConfig) -> None:
    """What `python -m fillm.rank` does."""
    check(config)
    console = Console()
    config = _with_default_data(config)
    forget = _rows(config.forget, "forget", config)
    retain = _rows(config.retain, "retain", config)
    config = _with_default_model(config, console)
    tokenizer = None
    if any("input_ids" not in row.fields for row in [*(forget or []), *(retain or [])]):
        tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    if config.dry_run:
        plan_run(config, _samples(config, tokenizer, None, forget, retain, console), console)
        return
    folder = RunFolder(config.out, overwrite=config.overwrite, resume=config.resume, notice=console.note)
    with folder:
        sets = _samples(config, tokenizer, None, forget, retain, console)
        model = _load(config, config.model, config.adapter)
        _check_vocabulary(sets, model)
        base = _load(config, config.base_model, None) if config.base_model else None
        ranking = _rank(config, model, base, sets, console, folder)
        folder.finish(lambda path: write_files(ranking, path))
    console.top_table(ranking, rows=20)
    console.say(f"run folder: {Path(config.out)}")


def _with_default_data(config: RankConfig) -> RankConfig:
    if config.model is not None:
        return config
    return dataclasses.replace(config, forget=config.forget or DEFAULT_FORGET, retain=config.retain or DEFAULT_RETAIN)


def _with_default_model(config: RankConfig, console: Console) -> RankConfig:
    if config.model is not None:
        return config
    if config.dry_run and not default_folder().exists():
        raise UsageError(
            "--dry-run: the embedded default model is not made yet; give --model, or run once without --dry-run"
        )
    return dataclasses.replace(config, model=str(default_model(console)))


@memory_explained()
def _load(config: RankConfig, path: str, adapter: str | None) -> nn.Module:
    model = load_model(
        path, adapter=adapter, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it; both names mean the same.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def _needs(config: RankConfig, which: str) -> bool:
    method = config.canonical_method
    return method not in WITHOUT_GRADIENTS and not (which == "retain" and method in FORGET_ALONE)


def _rows(spec: Any, which: str, config: RankConfig) -> Any:
    """The rows of a spec, read and checked before any model is loaded; None where the method needs none."""
    if not _needs(config, which):
        return None
    if spec is None:
        raise UsageError(f"--{which} is needed: a data spec such as rows.jsonl or tofu:forget05")
    return load_rows(spec, data_root=config.data_root, skip_bad_rows=config.skip_bad_rows)


def _samples(
    config: RankConfig, tokenizer: Any, model: nn.Module | None, forget: Any, retain: Any, console: Console
) -> dict[str, SampleSet]:
    sets: dict[str, SampleSet] = {}
    for which, given in (("forget", forget), ("retain", retain)):
        rows = (
            given if isinstance(given, list) and given and hasattr(given[0], "fields") else _rows(given, which, config)
        )
        if rows is None:
            continue
        source = given if isinstance(given, str) else getattr(config, which) or which
        found = tokenize_rows(
            rows,
            tokenizer,
            template=config.template,
            max_length=config.max_length,
            skip_bad_rows=config.skip_bad_rows,
            source=source,
        )
        for where, why in found.skipped[:10]:
            console.warn(f"skipped {where}: {why}")
        if found.skipped:
            console.warn(f"--{which}: {len(found.skipped)} of {len(rows)} rows skipped")
        sets[which] = take(found, getattr(config, f"num_{which}"), config.seed)
    if len(sets) == 2 and (shared := shared_rows(sets["forget"], sets["retain"])):
        count = shared if isinstance(shared, int) else len(shared)
        line = f"forget and retain share {count} rows"
        if config.strict:
            raise DataError(f"{line}; take them out of one, or leave out --strict")
        console.warn(line)
    if model is not None:
        _check_vocabulary(sets, model)
    return sets


def _check_vocabulary(sets: dict[str, SampleSet], model: nn.Module) -> None:
    if not hasattr(model, "get_input_embeddings"):
        return  # a model of another make looks its tokens up as it likes
    size = model.get_input_embeddings().weight.shape[0]
    for which, samples in sets.items():
        for sample in samples:
            largest = int(max(sample.input_ids))
            if largest >= size:
                raise DataError(
                    f"--{which}: sample {sample.id} has token id {largest}, the model's vocabulary ends at {size - 1}: "
                    f"give the model's own --tokenizer"
                )


@memory_explained()
def _rank(
    config: RankConfig,
    model: nn.Module,
    base_model: nn.Module | None,
    sets: dict[str, SampleSet],
    console: Console,
    folder: RunFolder | None,
) -> Ranking:
    begun = time.monotonic()
    scope = select_tensors(catalogue(model), config.include, config.exclude)
    fingerprints = _fingerprints(model, sets)
    if folder is not None:
        folder.check_identity({**fingerprints, **_identity(config)})
    capture = Capture(model, [info.name for info in scope], config.loss_reduction)
    passes = Passes(console, config.layout, config.tokens_per_batch, folder, config.checkpoint_seconds)
    checks: dict[str, Any] = {}
    if sets:
        checks = _checks(capture, sets, config, console)
    empty = SampleSet([], "none")
    job = Job(config, model, scope, capture, sets.get("forget", empty), sets.get("retain", empty), passes, base_model)
    with passes.stopping():
        scores = rank(job)
    _add_notes(scores, capture)
    record = {
        **_environment(capture),
        **fingerprints,
        "checks": checks,
        "passes": passes.record,
        "visited_again": scores.visited_again,
        "fallback": dict(capture.fallback),
        "skipped_rows": {which: len(s.skipped) for which, s in sets.items()},
        "seconds": round(time.monotonic() - begun, 3),
    }
    if scores.visited_again:
        console.note(f"{scores.visited_again} of {len(job.retain)} retain samples were visited again")
    return Ranking.from_rows(
        scores.rows,
        ascending=config.objective != "forget",
        granularity=config.granularity,
        method=config.canonical_method,
        objective=config.objective,
        updates=scores.update or None,
        samples=_sample_table(sets, passes),
        # What was said about the folder that lay there is no part of what a replay repeats.
        settings=dataclasses.asdict(dataclasses.replace(config, resume=False, overwrite=False, debug=False)),
        record=record,
    )


def _checks(capture: Capture, sets: dict[str, SampleSet], config: RankConfig, console: Console) -> dict[str, Any]:
    samples = sets.get("retain", sets["forget"])
    found = verify(capture, samples, config.layout)
    for name, reason in capture.fallback.items():
        console.warn(f"{name}: {reason}; it takes batch-1 autograd, exact and slower")
    difference = warn_of_noise(capture, samples, console, config.layout)
    return {
        "largest_difference_to_autograd": max(found.error.values(), default=0.0),
        "low_precision_difference": difference,
    }


def _fingerprints(model: nn.Module, sets: dict[str, SampleSet]) -> dict[str, str]:
    data = {f"{which}_fingerprint": samples.fingerprint for which, samples in sets.items()}
    return {"model_fingerprint": model_fingerprint(model), **data}


def _identity(config: RankConfig) -> dict[str, str]:
    """What a resumed run must share with the interrupted one, beside model and data."""
    settings = dataclasses.asdict(config)
    named = {flag_name(name): str(value) for name, value in settings.items() if name not in _WHEREABOUTS}
    # The order of a sum depends on the number of threads, and with it the last bits.
    return {**named, "threads": str(torch.get_num_threads())}


def _environment(capture: Capture) -> dict[str, Any]:
    device = capture.device
    return {
        "versions": {
            "fillm": fillm.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "backends": {op: found["used"].get(device.type, "torch") for op, found in fillm_kernels.backends().items()},
    }


def _add_notes(scores: Scores, capture: Capture) -> None:
    for row in scores.rows:
        if row["name"] in capture.fallback:
            row["note"] = "; ".join(filter(None, [row.get("note", ""), "batch-1 autograd"]))


def _sample_table(sets: dict[str, SampleSet], passes: Passes) -> pa.Table:
    columns: dict[str, list[Any]] = {"id": [], "set": [], "tokens": [], "loss": []}
    for which, samples in sets.items():
        losses = passes.losses.get(which)
        for position, sample in enumerate(samples):
            columns["id"].append(sample.id)
            columns["set"].append(which)
            columns["tokens"].append(len(sample.input_ids))
            columns["loss"].append(None if losses is None else float(losses[position]))
    types = [pa.string(), pa.string(), pa.int64(), pa.float64()]
    return pa.table({name: pa.array(values, t) for (name, values), t in zip(columns.items(), types, strict=True)})
