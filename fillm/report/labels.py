"""Short names for runs, made of the settings in which they differ."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fillm.errors import RunFolderError
from fillm.rank.config import RankConfig
from fillm.report.runs import Run
from fillm.runs import RUN_RECORD, read_record

# Where and how a run went on, not what it computed.
_BOOKKEEPING = {
    "checkpoint_every", "checkpoint_seconds", "data_root", "debug", "device", "dry_run", "gradient_checkpointing",
    "groups", "layout", "memory", "offload", "out", "overwrite", "resume", "skip_bad_rows", "store", "strict",
    "tokens_per_batch", "trust_remote_code",
}  # fmt: skip
# What a ranking shares with the unlearning, or what its repeats differ in.
_OF_A_RANKING = {"model", "adapter", "tokenizer", "method", "forget", "retain", "template", "seed", "save_update"}


def labels_of(runs: Sequence[Run], config: type, always: Sequence[str]) -> list[str]:
    """A label a run: the values of `always`, then `name value` of every other setting in which the runs differ.

    A value that is the default is not shown. Runs that this does not tell apart get their names behind it.

    Args:
        runs: of one command.
        config: the command's dataclass.
        always: settings whose value is always shown, without its name.
    """
    hidden = _BOOKKEEPING | set(always)
    default = {field.name: field.default for field in dataclasses.fields(config)}
    names = list(dict.fromkeys(name for run in runs for name in run.settings if name not in hidden))
    told = [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]
    labels = []
    for run in runs:
        parts = [str(run.settings[name]) for name in always if run.settings.get(name) is not None]
        parts += [
            f"{name.replace('_', ' ')} {run.settings[name]}"
            for name in told
            if run.settings.get(name, default.get(name)) != default.get(name)
        ]
        labels.append(", ".join(parts) or run.name)
    return [
        f"{label} ({run.name})" if labels.count(label) > 1 else label for run, label in zip(runs, labels, strict=True)
    ]


def recipe(run: Run) -> dict[str, Any]:
    """The settings that repeats of an unlearning share, whatever their seed and the model that was drawn with it.

    The ranking is described by how it was made rather than by its path, where it can still be read.
    """
    settings = {name: value for name, value in run.settings.items() if name not in {*_BOOKKEEPING, "seed", "model"}}
    if settings.get("ranking") is not None:
        named = str(settings["ranking"])
        settings["ranking"] = _ranking_words(run.place_of(named)) or named
    return settings


def _ranking_words(folder: Path) -> str | None:
    """Method and what is not the default, `soir, objective retain`; None if nothing can be read there."""
    try:
        record = read_record(folder / RUN_RECORD, "")
        method, settings = str(record["ranking"]["method"]), dict(record["settings"])
    except (RunFolderError, KeyError, TypeError, ValueError):
        return None
    default = {field.name: field.default for field in dataclasses.fields(RankConfig)}
    told = [name for name in settings if name not in _BOOKKEEPING | _OF_A_RANKING and name in default]
    return ", ".join([method, *(f"{n.replace('_', ' ')} {settings[n]}" for n in told if settings[n] != default[n])])
