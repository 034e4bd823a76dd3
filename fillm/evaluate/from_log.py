"""Scores a log that was published with TOFU: the same metrics, from the losses and recalls that it holds.

The layout is that of `eval_log_aggregated.json` in locuslab/tofu (Maini et al. 2024, arXiv 2401.06121): a section for
every row set, in it fields such as `avg_gt_loss`, in these a value for every row by its number.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fillm.documents import parse_json, read_bytes
from fillm.errors import DataError
from fillm.evaluate.config import FREE_ON_RESUME, EvaluateConfig
from fillm.evaluate.metric import Outcome
from fillm.evaluate.reference import COMPARED, LOG_ITSELF
from fillm.evaluate.results import EvaluateResult, merged, noted, write_result
from fillm.evaluate.row_sets import FORGET, REAL_AUTHORS, RETAIN, WORLD_FACTS
from fillm.evaluate.tofu import FORMS, SetScores, add_probability, add_rouge, add_truth_ratio
from fillm.evaluate.utility import add_forget_quality, add_model_utility
from fillm.paths import expanded
from fillm.rank.console import Console
from fillm.runs import RunFolder, run_identity, run_record

_SECTIONS = {
    FORGET: "eval_log_forget.json",
    RETAIN: "eval_log.json",
    REAL_AUTHORS: "eval_real_author_wo_options.json",
    WORLD_FACTS: "eval_real_world_wo_options.json",
}
_LARGEST_LOG = 1 << 28  # bytes; the published ones have a million
_LARGEST_LOSS = 1e300  # nats a token; the sum of a few is a number still
_OPTIONS = (REAL_AUTHORS, WORLD_FACTS)
_RECALL = "rougeL_recall"
_NUMBERS = ("avg_gt_loss", "avg_paraphrased_loss", _RECALL)
_LISTS = ("average_perturb_loss",)
_NO_REFERENCE = "compares with the retain model: give its log as --reference-log"


@dataclass(frozen=True)
class Log:
    """A published log.

    Attributes:
        path: of the file.
        fingerprint: sha256 of its bytes.
        scores: by row set; without those that the log does not have.
        keys: what the rows of a set are called.
        questions: by row set, prompt and true answer of every row, or None where the log does not tell.
    """

    path: str
    fingerprint: str
    scores: Mapping[str, SetScores]
    keys: Mapping[str, list[str]]
    questions: Mapping[str, list[tuple[str, str]] | None]


def run_from_log(config: EvaluateConfig, console: Console) -> EvaluateResult:
    """What `--from-log` does: scores the log and writes the run folder.

    Raises:
        DataError: a log that cannot be read, or a reference log over other rows.
    """
    log = read_log(str(config.from_log), "--from-log")
    reference = None if config.reference_log is None else read_log(config.reference_log, "--reference-log")
    with RunFolder(config.out, overwrite=config.overwrite, resume=config.resume, notice=console.note) as folder:
        prints = {"log": log.fingerprint, "reference_log": None if reference is None else reference.fingerprint}
        folder.check_identity(run_identity(config, prints, FREE_ON_RESUME))
        result = score_log(log, reference, config)
        record = run_record(config, prints, [], torch.device("cpu"))
        told = {**record, "result": result.summary, "notes": result.notes}
        folder.finish(lambda path: write_result(result, path, told))
    return result


def score_log(log: Log, reference: Log | None, config: EvaluateConfig) -> EvaluateResult:
    """All metrics of a log.

    Raises:
        DataError: a reference log over other forget rows.
    """
    outcome = Outcome()
    for add in (add_probability, add_rouge):
        for name, scores in log.scores.items():
            add(outcome, name, scores)
    for name, scores in log.scores.items():
        add_truth_ratio(outcome, name, scores, config.truth_ratio)
    kept = {name: log.scores[name] for name in _SECTIONS if name != FORGET and name in log.scores}
    if len(kept) == len(_SECTIONS) - 1:
        add_model_utility(outcome, kept, config.truth_ratio)
    else:
        lacking = [section for name, section in _SECTIONS.items() if name != FORGET and name not in kept]
        names = ("model_utility", *(f"model_utility_{each}" for each in FORMS))
        outcome.summary |= dict.fromkeys(names)
        outcome.notes |= dict.fromkeys(names, f"the log has no {', '.join(lacking)}")
    _forget_quality(outcome, log, reference, config)
    result = merged([outcome], log.keys)
    with_itself = reference is not None and reference.fingerprint == log.fingerprint
    return noted(result, COMPARED, LOG_ITSELF) if with_itself else result


def _forget_quality(outcome: Outcome, log: Log, reference: Log | None, config: EvaluateConfig) -> None:
    form, missing = config.truth_ratio, f"the log has no {_SECTIONS[FORGET]}"
    if FORGET not in log.scores:
        add_forget_quality(outcome, np.empty(0), None, missing)
        return
    theirs = None
    if reference is not None:
        if FORGET not in reference.scores:
            raise DataError(f"--reference-log {reference.path}: has no {_SECTIONS[FORGET]}; give a log that has")
        _check_same_rows(log, reference)
        theirs = reference.scores[FORGET].log_truth_ratios(form)
    add_forget_quality(outcome, log.scores[FORGET].log_truth_ratios(form), theirs, _NO_REFERENCE)


def _check_same_rows(log: Log, reference: Log) -> None:
    where = f"--reference-log {reference.path}"
    counts = len(log.keys[FORGET]), len(reference.keys[FORGET])
    if counts[0] != counts[1]:
        raise DataError(
            f"{where}: has {counts[1]} forget rows, the other log has {counts[0]}; give one of the same split"
        )
    mine, theirs = log.questions[FORGET], reference.questions[FORGET]
    if mine is None or theirs is None:
        return
    # In whatever order: the test compares two distributions.
    for key, row in zip(log.keys[FORGET], mine, strict=True):
        if mine.count(row) != theirs.count(row):
            raise DataError(f"{where}: asks not what forget row {key} asks; give a log of the same split and template")


def read_log(path: str, option: str) -> Log:
    """Reads a published log.

    Raises:
        DataError: no such file, not JSON, or not of the published layout; names section, field and row.
    """
    where = f"{option} {path}"
    try:
        raw = read_bytes(expanded(path), _LARGEST_LOG)
        found = parse_json(raw)
    except OSError as error:
        raise DataError(f"{where}: {error.strerror or error}; give an eval_log_aggregated.json") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({' '.join(str(error).split())}); give it whole") from None
    sections = {name: found[key] for name, key in _SECTIONS.items() if isinstance(found, dict) and key in found}
    if not sections:
        raise DataError(f"{where}: no published TOFU log: it has none of {', '.join(_SECTIONS.values())}")
    scores, keys, questions = {}, {}, {}
    for name, section in sections.items():
        place = f"{where}, {_SECTIONS[name]}"
        keys[name], columns = _columns(section, place)
        perturbed = [np.array(losses) for losses in columns["average_perturb_loss"]]
        answer, paraphrase = np.array(columns["avg_gt_loss"]), np.array(columns["avg_paraphrased_loss"])
        scores[name] = SetScores(answer, paraphrase, perturbed, columns["rougeL_recall"], name in _OPTIONS)
        texts = section.get("generated_text")
        questions[name] = _questions(texts, keys[name]) if isinstance(texts, dict) else None
    return Log(path, hashlib.sha256(raw).hexdigest(), scores, keys, questions)


def _columns(section: Any, where: str) -> tuple[list[str], dict[str, list[Any]]]:
    """The rows' names, and the fields that metrics use in the order of the rows."""
    fields = {name: section.get(name) if isinstance(section, dict) else None for name in (*_NUMBERS, *_LISTS)}
    for name, values in fields.items():
        if not isinstance(values, dict) or not values:
            raise DataError(
                f"{where}: no field {name!r} with a value for every row; give a log of the published layout"
            )
    keys = list(fields["avg_gt_loss"])
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    for name, values in fields.items():
        if set(values) != set(keys):
            raise DataError(
                f"{where}: {name!r} has {len(values)} rows, 'avg_gt_loss' has {len(keys)} others; give it whole"
            )
        for key in keys:
            numbers = values[key] if name in _LISTS else [values[key]]
            largest = 1.0 if name == _RECALL else _LARGEST_LOSS
            if not isinstance(numbers, list) or not numbers or not all(_is_number(one, largest) for one in numbers):
                what = "number from 0 to 1" if name == _RECALL else "finite loss of 0 or more, or list of them"
                raise DataError(f"{where}, {name!r}, row {key}: {str(values[key])[:40]!r} is no {what}")
            # A whole number beyond 64 bits would make an array of objects.
            columns[name].append([float(one) for one in numbers] if name in _LISTS else float(numbers[0]))
    return keys, columns


def _is_number(value: Any, largest: float) -> bool:
    # JSON's whole numbers have no bound, its NaN compares with nothing.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= largest


def _questions(texts: Mapping[str, Any], keys: list[str]) -> list[tuple[str, str]] | None:
    """Prompt and true answer, the first and the last of three texts."""
    rows = [texts.get(key) for key in keys]
    if not all(isinstance(row, list) and len(row) == 3 for row in rows):
        return None
    return [(str(row[0]), str(row[2])) for row in rows if row is not None]
