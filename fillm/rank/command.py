"""The ranking from start to end: data, model, passes, run folder."""

import dataclasses
import io
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fillm_kernels
import pyarrow as pa
import torch
from torch import nn

from fillm.capture import Capture, ShardedCapture, verify, verify_sharded
from fillm.config import from_mapping
from fillm.data import Reading, Row, SampleSet, check_fits_model
from fillm.data.reading import DataLike, forget_and_retain, skipped_lines
from fillm.errors import StoreError, UsageError
from fillm.models import (
    TensorInfo,
    catalogue,
    check_differentiable,
    load_model,
    load_sharded,
    load_tokenizer,
    model_fingerprint,
    select_tensors,
)
from fillm.rank.config import FORGET_ALONE, ON_CPU, WITHOUT_GRADIENTS, RankConfig, check, check_link, check_sharded
from fillm.rank.console import Console
from fillm.rank.default_model import DEFAULT_FORGET, DEFAULT_RETAIN, default_folder, default_model
from fillm.rank.layer_groups import layer_groups
from fillm.rank.methods import Job, Scores, rank
from fillm.rank.passes import Passes
from fillm.rank.plan import plan_run
from fillm.rank.precision import warn_of_noise
from fillm.rank.ranking import Ranking
from fillm.rank.ranking_files import write_files
from fillm.rank.sketch_choice import chosen_for_memory, with_sketches_chosen
from fillm.rank.sketch_probe import probe
from fillm.rank.units import layouts_of
from fillm.runs import RunFolder, check_inputs_outside, run_identity, run_record
from fillm.runs.memory import give_back_freed_blocks, memory_explained
from fillm.runs.processes import Processes, several_started
from fillm.statistics import SketchStore, holds_store, refuse_foreign

# Settings of the command that a function with a model in hand has no use for.
_COMMAND_ONLY = {
    "adapter", "dtype", "device", "trust_remote_code", "gradient_checkpointing", "shard", "out", "resume", "overwrite",
    "dry_run", "checkpoint_seconds", "debug", "plan_devices", "plan_flops", "plan_bandwidth", "plan_link",
}  # fmt: skip
# Settings that say where and how a run goes on, not what it computes.
_FREE_ON_RESUME = ("out", "resume", "overwrite", "dry_run", "debug", "checkpoint_seconds", "data_root")


@torch.inference_mode(False)
def rank_parameters(
    model: nn.Module,
    tokenizer: Any,
    forget: DataLike,
    retain: DataLike = None,
    method: str = "soir",
    *,
    base_model: nn.Module | None = None,
    progress: bool = False,
    **settings: Any,
) -> Ranking:
    """Ranks a model's parameters by what they hold of the forget set.

    Args:
        model: a causal language model; returned as it came (mode, `requires_grad`, weights).
        tokenizer: of the model, loaded; None if the rows carry `input_ids` and `labels`.
        forget: a data spec, a `datasets.Dataset` or any sequence of rows.
        retain: the same; not needed by `saliency`, `gradient`, `parameter-shift`, `random` and `none`.
        method: as `--method`.
        base_model: the model before fine-tuning, for `parameter-shift`.
        progress: show progress bars and the warnings on stderr.
        settings: the other fields of `fillm.rank.RankConfig`; `include` and `exclude` may be lists of kinds and globs.

    Returns:
        The ranking, with `u` in `updates` where it was asked for or needed.

    Raises:
        FillmError: one line that says what is wrong, where, and what to do.
    """
    if misplaced := sorted(_COMMAND_ONLY & set(settings)):
        raise UsageError(f"rank_parameters: {', '.join(misplaced)}: a setting of the command, not of this function")
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: give the loaded model, not a {type(model).__name__}")
    if tokenizer is not None and not callable(tokenizer):
        raise UsageError(f"tokenizer: give the loaded tokenizer of transformers, not a {type(tokenizer).__name__}")
    if base_model is not None and not isinstance(base_model, nn.Module):
        raise UsageError("base_model: give the loaded model, not a path")
    settings |= {name: _joined(settings[name]) for name in ("include", "exclude") if name in settings}
    config = from_mapping(RankConfig, {"method": method, **settings}, where="rank_parameters")
    check(dataclasses.replace(config, base_model=config.base_model or ("given" if base_model is not None else None)))
    console = Console() if progress else Console.silent()
    config = with_sketches_chosen(config)
    # A spec given here is what the set is called.
    named = {w: data for w, data in (("forget", forget), ("retain", retain)) if isinstance(data, str)}
    sets = _samples(dataclasses.replace(config, **named), tokenizer, _read(config, forget, retain, console), console)
    return _rank(config, model, base_model, sets, console, None, Processes(alone=True))


def _joined(patterns: Any) -> Any:
    """A list of patterns as the one string that the option takes; an empty list is no choice, and will be refused."""
    listed = isinstance(patterns, list | tuple) and patterns and all(isinstance(one, str) for one in patterns)
    return ",".join(patterns) if listed else patterns


@memory_explained()
def run(config: RankConfig) -> None:
    """What `python -m fillm.rank` does."""
    processes = Processes(config.device) if several_started() else Processes(alone=True)
    with processes.together():
        console = Console() if processes.first else Console(io.StringIO(), io.StringIO())
        _run(config, processes, console)


def _run(config: RankConfig, processes: Processes, console: Console) -> None:
    check(config)
    devices = config.plan_devices or processes.count  # with --dry-run those that are planned for
    check_link(config, devices)
    if config.shard:
        check_sharded(config, devices)
    check_inputs_outside(config)
    config = with_sketches_chosen(_with_default_data(config))
    rows = _read(config, config.forget, config.retain, console)
    config = _with_default_model(config, processes, console)
    tokenizer = None
    if any("input_ids" not in row.fields for some in rows.values() for row in some):
        source, flag = (config.tokenizer, "--tokenizer") if config.tokenizer else (config.model, "--model")
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code, option=flag)
    if config.dry_run:
        if processes.first:
            plan_run(config, _samples(config, tokenizer, rows, console), console, devices)
        return
    folder = None
    if processes.first:  # and nobody else: the others save nothing and have nothing to read
        folder = RunFolder(config.out, overwrite=config.overwrite, resume=config.resume, notice=console.note)
    with folder or nullcontext():
        sets = _samples(config, tokenizer, rows, console)
        device = config.device if processes.count == 1 else str(processes.device)
        model = _load(config, config.model, config.adapter, device)
        processes.meet()  # before any process gathers what another may not have
        base = _load(config, config.base_model, None, device) if config.base_model else None
        ranking = _rank(config, model, base, sets, console, folder, processes)
        if folder is not None:
            folder.finish(lambda path: write_files(ranking, path))
    console.top_table(ranking, rows=20)
    if (sketch := ranking.record.get("sketch")) is not None:
        console.say(
            f"error bars: half of them within {sketch['median_relative_error_bar']:.2g} of the score, the widest "
            f"{sketch['widest_relative_error_bar']:.2g}; the first {sketch['top_set']} are the right ones with "
            f"probability {sketch['top_set_confidence']:.2f}"
        )
    console.say(f"run folder: {Path(config.out)}")


def _with_default_data(config: RankConfig) -> RankConfig:
    if config.model is not None:
        return config
    return dataclasses.replace(config, forget=config.forget or DEFAULT_FORGET, retain=config.retain or DEFAULT_RETAIN)


def _with_default_model(config: RankConfig, processes: Processes, console: Console) -> RankConfig:
    if config.model is not None:
        return config
    if config.dry_run and not default_folder().exists():
        raise UsageError(
            "--dry-run: the embedded default model is not made yet; give --model, or run once without --dry-run"
        )
    if not processes.first:
        processes.meet()
    path = default_model(console)  # made by the first process, found by the others
    if processes.first:
        processes.meet()
    return dataclasses.replace(config, model=str(path))


@memory_explained()
def _load(config: RankConfig, path: str, adapter: str | None, device: str) -> nn.Module:
    if config.shard:
        model = load_sharded(
            path, dtype=config.dtype, device=torch.device(device), trust_remote_code=config.trust_remote_code
        )
    else:
        model = load_model(
            path, adapter=adapter, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code
        )
    if config.memory_before_time:
        give_back_freed_blocks()
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it; both names mean the same.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def _needs(config: RankConfig, which: str) -> bool:
    method = config.canonical_method
    return method not in WITHOUT_GRADIENTS and not (which == "retain" and method in FORGET_ALONE)


def _from_store(config: RankConfig, retain: DataLike) -> bool:
    """Whether the retain set is what a store holds: none was given, and there is one."""
    return retain is None and config.store is not None and holds_store(config.store)


def _read(config: RankConfig, forget: DataLike, retain: DataLike, console: Console) -> dict[str, list[Row]]:
    """The rows that the method needs, read and checked before any model is loaded."""
    reading = Reading(config, console.warn)
    given = {"forget": forget, "retain": retain}
    if _from_store(config, retain):
        if config.num_retain is not None:
            raise UsageError(
                f"--num-retain {config.num_retain} has no effect: without --retain, all samples of --store are the "
                "retain set; leave it out, or give --retain"
            )
        del given["retain"]
    elif retain is None and config.store is not None:
        refuse_foreign(config.store)
        raise StoreError(f"{config.store}: there is no store yet; give --retain to build one, or another --store")
    return {which: reading.rows(data, f"--{which}") for which, data in given.items() if _needs(config, which)}


def _samples(
    config: RankConfig, tokenizer: Any, rows: Mapping[str, list[Row]], console: Console
) -> dict[str, SampleSet]:
    return forget_and_retain(config, tokenizer, rows, Reading(config, console.warn))


@memory_explained()
def _rank(
    config: RankConfig,
    model: nn.Module,
    base_model: nn.Module | None,
    sets: dict[str, SampleSet],
    console: Console,
    folder: RunFolder | None,
    processes: Processes,
) -> Ranking:
    begun = time.monotonic()
    if sets:
        check_differentiable(model)
    for which, samples in sets.items():
        check_fits_model(samples, model, f"--{which}")
    scope = select_tensors(catalogue(model), config.include, config.exclude)
    groups = layer_groups(scope, config.groups)
    kind = ShardedCapture if config.shard else Capture
    capture = kind(model, [info.name for info in scope], config.loss_reduction)
    if config.offload and capture.device.type == "cpu":
        raise UsageError(f"--offload is not taken here: {ON_CPU}; leave it out")
    config, choice = chosen_for_memory(
        config, scope, sum(map(len, sets.values())), len(sets.get("retain", ())),
        lambda: probe(config, capture, scope, sets["forget"], sets["retain"]),
    )  # fmt: skip
    if choice:
        console.note(choice)
    fingerprints = {"model": model_fingerprint(model), **{which: s.fingerprint for which, s in sets.items()}}
    processes.agree(json.dumps(fingerprints))
    if folder is not None:
        # The order of a sum depends on the number of threads, and with it the last bits.
        threads = {"threads": str(torch.get_num_threads())}
        folder.check_identity({**run_identity(config, fingerprints, _FREE_ON_RESUME), **threads})
    passes = Passes(console, config.layout, config.tokens_per_batch, folder, config.checkpoint_seconds, processes)
    checks: dict[str, Any] = {}
    if sets:
        checks = _checks(capture, groups, sets, config, console)
    capture.offload = config.offload  # the checks before looked at gradients where they are
    empty = SampleSet([], "none")
    job = Job(
        config,
        model,
        scope,
        capture,
        sets.get("forget", empty),
        sets.get("retain", empty),
        passes,
        base_model,
        str(fingerprints["model"]),
    )
    with passes.stopping():
        scores = rank(job)
    _add_notes(scores, capture)
    record = run_record(config, fingerprints, skipped_lines(sets.values()), capture.device)
    settings = record.pop("settings")
    record |= {
        "processes": processes.count,
        "backends": {op: b["used"].get(capture.device.type, "torch") for op, b in fillm_kernels.backends().items()},
        "checks": checks,
        "passes": passes.record,
        "visited_again": scores.visited_again,
        "one_by_one": capture.alone or None,
        "fallback": dict(capture.fallback),
        "rounding_noise": dict(capture.noise),
        **scores.record,
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
        samples=_sample_table(sets, passes, job.stored),
        per_sample=scores.per_sample,
        tensors=layouts_of(model, scope, config.granularity),
        settings=settings,
        record=record,
    )


def _checks(
    capture: Capture,
    groups: Sequence[Sequence[TensorInfo]],
    sets: dict[str, SampleSet],
    config: RankConfig,
    console: Console,
) -> dict[str, Any]:
    # Of both sets: were one of equal lengths throughout, it would say nothing of the padding that the other gets.
    both = SampleSet([sample for some in sets.values() for sample in some], "both sets")
    if isinstance(capture, ShardedCapture):
        names = [[info.name for info in infos] for infos in groups]
        found = verify_sharded(capture, both, names, config.layout)
        return {"largest_difference_to_autograd": max(found.error.values(), default=0.0)}
    found = verify(capture, both, config.layout)
    if capture.alone:
        console.warn(f"{capture.alone}: samples influence each other; every one runs by itself, exact and slower")
    for name, reason in capture.fallback.items():
        console.warn(f"{name}: {reason}; it takes batch-1 autograd, exact and slower")
    difference = warn_of_noise(capture, max(sets.values(), key=len), console, config.layout)
    return {
        "largest_difference_to_autograd": max(found.error.values(), default=0.0),
        "low_precision_difference": difference,
    }


def _add_notes(scores: Scores, capture: Capture) -> None:
    for row in scores.rows:
        how = "batch-1 autograd" if row["name"] in capture.fallback else "batches of one" if capture.alone else ""
        row["note"] = "; ".join(filter(None, [row.get("note", ""), how]))


def _sample_table(sets: dict[str, SampleSet], passes: Passes, stored: SketchStore | None) -> pa.Table:
    rows: list[tuple[str, str, int, float | None]] = []
    for which, samples in sets.items():
        losses = passes.losses.get(which)
        for position, sample in enumerate(samples):
            loss = None if losses is None else float(losses[position])
            rows.append((sample.id, which, len(sample.input_ids), loss))
    if stored is not None and "retain" not in sets:
        order = stored.positions.argsort().tolist()
        rows += [(stored.ids[i], "retain", int(stored.tokens[i]), float(stored.losses[i])) for i in order]
    names, types = ("id", "set", "tokens", "loss"), (pa.string(), pa.string(), pa.int64(), pa.float64())
    columns = zip(*rows, strict=True) if rows else [[]] * len(names)
    return pa.table({name: pa.array(list(c), t) for name, c, t in zip(names, columns, types, strict=True)})
