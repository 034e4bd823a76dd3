"""Evaluation from start to end: rows, model, passes, metrics, run folder."""

import io
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fillm.config import from_mapping
from fillm.data import Row
from fillm.errors import UsageError
from fillm.evaluate.config import COMMAND_ONLY, FREE_ON_RESUME, EvaluateConfig, resolved
from fillm.evaluate.dealing import Deal
from fillm.evaluate.evidence import Evidence, gather, prepare
from fillm.evaluate.general import general_metric
from fillm.evaluate.metric import Metric, Needs, Outcome
from fillm.evaluate.reference import COMPARED, ITSELF, load_reference
from fillm.evaluate.registry import chosen_metrics
from fillm.evaluate.results import EvaluateResult, merged, noted, write_result
from fillm.evaluate.row_sets import read_rows, row_sets
from fillm.models import load_model, load_tokenizer, model_fingerprint
from fillm.rank.console import Console
from fillm.rank.passes import peak_memory
from fillm.runs import RunFolder, check_inputs_outside, run_identity, run_record, signals_noted
from fillm.runs.memory import memory_explained
from fillm.runs.processes import Processes, several_started


@memory_explained()
def run(config: EvaluateConfig) -> None:
    """What `python -m fillm.evaluate` does."""
    processes = Processes(config.device) if several_started() else Processes(alone=True)
    with processes.together():
        console = Console() if processes.first else Console(io.StringIO(), io.StringIO())
        _run(config, processes, console)


def _run(config: EvaluateConfig, processes: Processes, console: Console) -> None:
    config = resolved(config)
    check_inputs_outside(config)
    if config.from_log is not None:
        from fillm.evaluate.from_log import run_from_log

        if processes.first:
            _tell(run_from_log(config, console), config, console)
        return
    evidence, metrics, needs = _prepared(config, None, console)
    if config.dry_run:
        for line in _plan_lines(evidence, needs):
            console.say(line)
        return
    folder = None
    if processes.first:  # and nobody else: the others save nothing and have nothing to read
        folder = RunFolder(config.out, overwrite=config.overwrite, resume=config.resume, notice=console.note)
    with folder or nullcontext():
        processes.meet()  # what is wrong with the folder ends all of them before a model is loaded
        model = _load(config, config.device if processes.count == 1 else str(processes.device))
        # A signal acts at once where nobody waits; several processes end at their next meeting.
        with signals_noted() if processes.count > 1 else nullcontext(lambda: None) as interrupted:
            evidence.deal = Deal(processes, interrupted)
            result, record = _evaluated(evidence, metrics, needs, model, folder)
            if folder is not None:
                folder.finish(lambda path: write_result(result, path, record))
    _tell(result, config, console)


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,
    *,
    benchmark: str = "tofu",
    forget: str,
    reference: str | None = None,
    out: str | None = None,
    progress: bool = False,
    **settings: Any,
) -> EvaluateResult:
    """Evaluates a model, which stays as it is.

    Args:
        model: a causal language model of transformers, on its device; comes back in the mode it came in.
        tokenizer: of the model, loaded.
        benchmark: as `--benchmark`.
        forget: the forget split, as `--forget`.
        reference: run folder of the retain model's evaluation; without it what is compared with it is None.
        out: run folder to write, as the command does; None writes none.
        progress: show progress and warnings on stderr.
        settings: the other fields of `fillm.evaluate.EvaluateConfig`.

    Returns:
        The figures, the reasons for those that are missing, and the table of rows.

    Raises:
        FillmError: one line that says what is wrong, where, and what to do.
    """
    if misplaced := sorted(set(COMMAND_ONLY) & set(settings)):
        raise UsageError(f"evaluate_model: {', '.join(misplaced)}: a setting of the command, not of this function")
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: give the loaded model, not a {type(model).__name__}")
    if out is None and (settings.get("resume") or settings.get("overwrite")):
        raise UsageError("evaluate_model: resume and overwrite need out, the run folder")
    named = {"benchmark": benchmark, "forget": forget, "reference": None if reference is None else str(reference)}
    place = {} if out is None else {"out": str(out)}
    config = from_mapping(EvaluateConfig, {**named, **place, **settings}, where="evaluate_model")
    config, console = resolved(config, given=True), Console() if progress else Console.silent()
    evidence, metrics, needs = _prepared(config, tokenizer, console)
    if out is None:
        return _evaluated(evidence, metrics, needs, model, None)[0]
    with RunFolder(config.out, overwrite=config.overwrite, resume=config.resume, notice=console.note) as folder:
        result, record = _evaluated(evidence, metrics, needs, model, folder)
        folder.finish(lambda path: write_result(result, path, record))
    return result


def _prepared(config: EvaluateConfig, tokenizer: Any, console: Console) -> tuple[Evidence, list[Metric], Needs]:
    """Everything that can be found wrong before a model is loaded."""
    metrics = chosen_metrics(config.benchmark, config.metrics)
    if config.lm_eval is not None:
        metrics.append(general_metric(config.lm_eval))
    sets = row_sets(config)
    needs = Needs()
    for metric in metrics:
        needs |= metric.needs(sets)
    reference = None if config.reference is None else load_reference(config.reference)
    rows: Mapping[str, list[Row]] = {name: read_rows(sets[name], config) for name in sets if name in needs.row_sets}
    if tokenizer is None:
        source, flag = (config.tokenizer, "--tokenizer") if config.tokenizer else (config.model, "--model")
        tokenizer = load_tokenizer(str(source), trust_remote_code=config.trust_remote_code, option=flag)
    evidence = prepare(config, sets, rows, needs, tokenizer, console)
    if reference is not None:
        counts = {name: len(some) for name, some in rows.items()}
        reference.check_same_rows(vars(config), _fingerprints(evidence), counts)
        evidence.reference = reference
    return evidence, metrics, needs


@memory_explained()
def _load(config: EvaluateConfig, device: str) -> nn.Module:
    return load_model(
        str(config.model),
        adapter=config.adapter,
        dtype=config.dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )


@memory_explained()
def _evaluated(
    evidence: Evidence, metrics: list[Metric], needs: Needs, model: nn.Module, folder: RunFolder | None
) -> tuple[EvaluateResult, dict[str, Any]]:
    config, begun = evidence.config, time.monotonic()
    device = next(model.parameters()).device
    record: dict[str, Any] = {}
    reference, fingerprint, processes = evidence.reference, "", evidence.deal.processes
    if folder is not None or reference is not None or processes.count > 1:
        fingerprint = model_fingerprint(model)
    with_itself = reference is not None and reference.is_of(fingerprint)
    prints = {"model": fingerprint, **_fingerprints(evidence)}
    processes.agree(json.dumps(prints))
    if folder is not None:
        # The order of a sum depends on the device and on the number of threads, and with it the last bits.
        machine = {"device": device.type, "threads": str(torch.get_num_threads())}
        folder.check_identity({**run_identity(config, prints, FREE_ON_RESUME), **machine})
        record = run_record(config, prints, [], device)
    if with_itself:  # before the passes, which may take long
        evidence.console.warn(f"--reference {config.reference}: {ITSELF}")
    gather(evidence, needs, model, folder)
    outcomes: list[Outcome] = [metric.compute(evidence) for metric in metrics]
    ids = {name: [sample.id for sample in evidence.samples(name)] for name in evidence.rows}
    result = merged(outcomes, ids)
    if with_itself:
        result = noted(result, COMPARED, ITSELF)
    peak = max(own for (own,) in processes.meet(peak_memory(device)))
    measured = {
        "processes": processes.count, "seconds": round(time.monotonic() - begun, 3), "peak_memory_bytes": peak
    }  # fmt: skip
    return result, {**record, **measured, "result": result.summary, "notes": result.notes}


def _fingerprints(evidence: Evidence) -> dict[str, str]:
    """Of the tokens of everything that is scored, by `<row set>.<field>`."""
    return {f"{name}.{field}": one.samples.fingerprint for (name, field), one in sorted(evidence.samples_of.items())}


def _plan_lines(evidence: Evidence, needs: Needs) -> list[str]:
    """What would be done."""
    lines = [f"{name}: {len(rows)} rows of {evidence.sets[name].spec}" for name, rows in evidence.rows.items()]
    scored = [evidence.samples_of[pair].samples for pair in sorted(needs.answers)]
    texts, tokens = sum(map(len, scored)), sum(samples.num_tokens for samples in scored)
    lines.append(f"scored: {texts} texts, {tokens} tokens")
    questions = sum(len(evidence.rows[name]) for name in needs.generated)
    lines.append(f"generated: {questions} answers of at most {evidence.config.max_new_tokens} tokens")
    return lines


def _tell(result: EvaluateResult, config: EvaluateConfig, console: Console) -> None:
    for line in result.lines():
        console.say(line)
    console.say(f"run folder: {Path(config.out)}")
