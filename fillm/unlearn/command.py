"""Unlearning from start to end: data, model, mask, run folder."""

import dataclasses
import io
import json
import tempfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fillm.config import from_mapping
from fillm.data import Reading, Row, SampleSet, check_fits_model, take
from fillm.data.reading import DataLike, forget_and_retain, skipped_lines
from fillm.errors import UsageError
from fillm.masks import Mask
from fillm.models import (
    DTYPES,
    check_differentiable,
    load_model,
    load_tokenizer,
    model_fingerprint,
    stored_dtypes,
)
from fillm.rank.console import Console
from fillm.rank.ranking import Ranking
from fillm.runs import RunFolder, check_inputs_outside, run_identity, run_record
from fillm.runs.memory import memory_explained
from fillm.runs.processes import Processes
from fillm.unlearn.alternatives import read_refusals
from fillm.unlearn.choosing import check_made_for, chosen_mask, reached_by, updates_for
from fillm.unlearn.config import COMMAND_ONLY, FREE_ON_RESUME, INFLUENCE, TASK_VECTOR, UnlearnConfig, loss_options
from fillm.unlearn.config import resolved as resolved_settings
from fillm.unlearn.followed import Folder, FollowedFolder
from fillm.unlearn.losses import LossOptions, canonical_loss, resolved_options
from fillm.unlearn.masked_optimizer import mask_digest
from fillm.unlearn.plan import plan_lines, plan_of
from fillm.unlearn.results import UnlearnResult, write_result
from fillm.unlearn.unlearning import Job, adapter_folder, carry_out


@memory_explained()
def run(config: UnlearnConfig) -> None:
    """What `python -m fillm.unlearn` does."""
    processes = Processes(config.device)
    with processes.together():
        console = Console() if processes.first else Console(io.StringIO(), io.StringIO())
        _run(config, processes, console)


def _run(config: UnlearnConfig, processes: Processes, console: Console) -> None:
    config = _resolved(config)
    rows = _read(config, config.forget, config.retain, console)
    ranking = None if config.ranking is None else Ranking.load(config.ranking)
    mask, masks = chosen_mask(config, ranking)
    tokenizer = None
    if any("input_ids" not in row.fields for some in rows.values() for row in some):
        source, flag = (config.tokenizer, "--tokenizer") if config.tokenizer else (config.model, "--model")
        tokenizer = load_tokenizer(str(source), trust_remote_code=config.trust_remote_code, option=flag)
    if config.dry_run:
        sets = _samples(config, tokenizer, rows, console)
        for line in plan_lines(config, mask, sets):
            console.say(line)
        return
    with _folder(config, processes, console) as folder:
        sets = _samples(config, tokenizer, rows, console)
        model, dtypes = _load(config, processes.device)
        given = _Given(model, tokenizer, mask, masks, ranking, rows, sets, dtypes)
        result, record = _unlearn(config, given, folder, processes, console, show=processes.first)
        adapter = adapter_folder(folder) if config.lora_rank is not None else None
        folder.finish(lambda path: write_result(result, path, record, tokenizer, dtypes, adapter))
    for line in result.lines():
        console.say(line)
    console.say(f"run folder: {Path(config.out)}")


def unlearn_model(
    model: nn.Module,
    tokenizer: Any,
    forget: DataLike,
    retain: DataLike,
    *,
    mask: Mask | None = None,
    ranking: Ranking | None = None,
    loss: str = "grad-diff",
    out: str | None = None,
    progress: bool = False,
    **settings: Any,
) -> UnlearnResult:
    """Unlearns the forget set inside a mask of a model, in place.

    Args:
        model: a causal language model on its device; comes back in the mode it came in.
        tokenizer: of the model, loaded; None if the rows carry `input_ids` and `labels`.
        forget: a data spec, a `datasets.Dataset` or any sequence of rows.
        retain: the same.
        mask: what may change; or give `ranking` and `select`.
        ranking: of the model. With `loss="influence"` it holds `u`.
        loss: as `--loss`.
        out: run folder to write, as the command does; None writes none.
        progress: show progress and warnings on stderr.
        settings: the other fields of `fillm.unlearn.UnlearnConfig`.

    Returns:
        The losses before and after, the verification and the log.

    Raises:
        FillmError: one line that says what is wrong, where, and what to do.
    """
    if misplaced := sorted(set(COMMAND_ONLY) & set(settings)):
        raise UsageError(f"unlearn_model: {', '.join(misplaced)}: a setting of the command, not of this function")
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: give the loaded model, not a {type(model).__name__}")
    if out is None and (settings.get("resume") or settings.get("overwrite")):
        raise UsageError("unlearn_model: resume and overwrite need out, the run folder")
    if (mask is None) == (settings.get("select") is None):
        raise UsageError("unlearn_model: give either mask, or ranking and select")
    named = {which: data for which, data in (("forget", forget), ("retain", retain)) if isinstance(data, str)}
    place = {} if out is None else {"out": str(out)}
    config = from_mapping(UnlearnConfig, {"loss": loss, **named, **place, **settings}, where="unlearn_model")
    config = _resolved(config, given=True)
    if ranking is None and (config.loss == INFLUENCE or mask is None):
        raise UsageError("unlearn_model: give ranking, a fillm.Ranking of this model")
    if ranking is not None and mask is not None and config.loss != INFLUENCE:
        raise UsageError("unlearn_model: ranking has no effect beside mask, but for loss='influence'; leave one out")
    masks = None
    if mask is None:
        mask, masks = chosen_mask(config, ranking)
    processes = Processes(str(next(model.parameters()).device), alone=True)
    console = Console() if progress else Console.silent()
    rows = _read(config, forget, retain, console)
    sets = _samples(config, tokenizer, rows, console)
    given = _Given(model, tokenizer, mask, masks, ranking, rows, sets, {})
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            config = dataclasses.replace(config, out=str(Path(scratch) / "run"), checkpoint_every=float("inf"))
            with _folder(config, processes, console) as folder:
                return _unlearn(config, given, folder, processes, console, show=progress)[0]
    with _folder(config, processes, console) as folder:
        result, record = _unlearn(config, given, folder, processes, console, show=progress)
        adapter = adapter_folder(folder) if config.lora_rank is not None else None
        folder.finish(lambda path: write_result(result, path, record, tokenizer, {}, adapter))
    return result


@dataclasses.dataclass(frozen=True)
class _Given:
    """What a run is made from, loaded; `dtypes` as of `Job`."""

    model: nn.Module
    tokenizer: Any
    mask: Mask
    masks: Mapping[str, Mask] | None
    ranking: Ranking | None
    rows: Mapping[str, list[Row]]
    sets: Mapping[str, SampleSet]
    dtypes: Mapping[str, torch.dtype]


def _resolved(config: UnlearnConfig, given: bool = False) -> UnlearnConfig:
    """All settings checked before anything is read, the loss under the name it has here."""
    config = dataclasses.replace(config, loss=canonical_loss(config.loss, beside=(TASK_VECTOR, INFLUENCE)))
    options = LossOptions(**loss_options(config))
    if config.loss not in (INFLUENCE, TASK_VECTOR) and "idk" in resolved_options(config.loss, options):
        read_refusals(config.idk)
    config = resolved_settings(config, given=given)
    check_inputs_outside(config)
    return config


def _read(config: UnlearnConfig, forget: DataLike, retain: DataLike, console: Console) -> dict[str, list[Row]]:
    reading = Reading(config, console.warn)
    return {"forget": reading.rows(forget, "--forget"), "retain": reading.rows(retain, "--retain")}


def _samples(
    config: UnlearnConfig, tokenizer: Any, rows: Mapping[str, list[Row]], console: Console
) -> dict[str, SampleSet]:
    sets = forget_and_retain(config, tokenizer, rows, Reading(config, console.warn))
    plan_of(config, len(sets["forget"]))  # refuses what cannot be, before a model is loaded
    return sets


def _folder(config: UnlearnConfig, processes: Processes, console: Console) -> Folder:
    """The run folder: held by the first process, followed by the others once it is open."""
    folder: Folder = FollowedFolder(config.out)
    if processes.first:
        folder = RunFolder(config.out, overwrite=config.overwrite, resume=config.resume, notice=console.note)
    processes.meet()  # what is wrong with it ends all of them before a model is loaded
    return folder


@memory_explained()
def _load(config: UnlearnConfig, device: torch.device) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """The model on its device, and by parameter the type it was saved in, in which it is saved again.

    It is loaded in the widest type in its files, whatever config.json says: a narrower one would round weights.
    """
    stored = stored_dtypes(str(config.model))
    widest = reduce(torch.promote_types, stored.values()) if stored else None
    model = load_model(
        str(config.model),
        adapter=config.adapter,
        dtype=next((name for name, dtype in DTYPES.items() if dtype == widest), "auto"),
        device=str(device),
        trust_remote_code=config.trust_remote_code,
    )
    # Where a file has several types, a tensor that it knows by another name keeps the widest.
    dtypes = {name: stored.get(name, p.dtype) for name, p in model.named_parameters()}
    if config.dtype != "auto":
        wanted = DTYPES[config.dtype]
        narrowed = next((name for name, dtype in dtypes.items() if torch.promote_types(dtype, wanted) != wanted), None)
        if narrowed is not None:
            saved = str(dtypes[narrowed]).removeprefix("torch.")
            raise UsageError(
                f"--dtype {config.dtype}: {narrowed} was saved in {saved}; rounding would change weights outside the "
                "mask; leave it out and give --mixed-precision bf16"
            )
        for parameter in model.parameters():
            parameter.data = parameter.data.to(wanted)
    if torch.float16 in {p.dtype for p in model.parameters()}:
        raise UsageError("the model was saved in float16, in which gradients underflow; give --dtype float32")
    return model, dtypes


@memory_explained()
def _unlearn(
    config: UnlearnConfig, given: _Given, folder: Folder, processes: Processes, console: Console, show: bool
) -> tuple[UnlearnResult, dict[str, Any]]:
    if config.lora_rank is not None and (given.masks is not None or hasattr(given.model, "merge_and_unload")):
        raise UsageError("--lora-rank puts adapters into a plain model, the same for all samples")
    check_differentiable(given.model)
    for which, samples in given.sets.items():
        check_fits_model(samples, given.model, f"--{which}")
    fingerprint = model_fingerprint(given.model)
    check_made_for(given.mask, given.model, fingerprint)
    updates = None
    if config.loss == INFLUENCE and given.ranking is not None:
        updates = updates_for(given.ranking, given.model, fingerprint)
    forget, retain = given.sets["forget"], given.sets["retain"]
    drawn = min(config.eval_retain or len(retain), len(retain))
    prints = {"initial_model": fingerprint, "forget": forget.fingerprint, "retain": retain.fingerprint}
    prints["mask"] = mask_digest(given.mask)
    # The order of a sum depends on the device and on the number of threads, and with it the last bits.
    machine = {"device": processes.device.type, "threads": str(torch.get_num_threads())}
    processes.agree(json.dumps(prints))
    folder.check_identity({**run_identity(config, prints, FREE_ON_RESUME), **machine})
    record = run_record(config, prints, skipped_lines(given.sets.values()), processes.device)
    job = Job(
        config=config,
        model=given.model,
        dtypes=given.dtypes,
        fingerprint=fingerprint,
        mask=given.mask,
        reaches=reached_by(given.masks, forget),
        updates=updates,
        rows=given.rows["forget"],
        tokenizer=given.tokenizer,
        forget=forget,
        retain=retain,
        evaluated=take(retain, drawn, config.seed, "--eval-retain"),
        folder=folder,
        processes=processes,
        console=console,
        show=show,
    )
    return carry_out(job), {**record, "processes": processes.count}
