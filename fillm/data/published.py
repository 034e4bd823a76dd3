"""TOFU, KnowUnDo and other Hub data sets: from the data root when it holds them, else from the Hugging Face Hub.

Sources: TOFU, Maini et al. 2024, arXiv 2401.06121 (locuslab/TOFU); KnowUnDo, Tian et al. 2024, arXiv 2407.01920
(zjunlp/KnowUnDo).
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fillm.data.files import Record, read_records
from fillm.data.specs import DataSpec
from fillm.errors import DataError, UsageError
from fillm.hub import announce, quiet_loggers
from fillm.paths import expanded

DATA_ROOT_VARIABLE = "FILLM_DATA"

_TOFU_SPLITS = (
    *("full", "retain99", "retain95", "retain90", "retain_perturbed"),
    *(
        split.format(percent)
        for split in ("forget{}", "forget{}_perturbed", "holdout{}")
        for percent in ("01", "05", "10")
    ),
    *(f"{split}{ending}" for split in ("real_authors", "world_facts") for ending in ("", "_perturbed")),
)
_KNOWUNDO_SPLITS = tuple(
    f"{domain}/{part}_{subset}"
    for domain in ("privacy", "copyright")
    for part in ("unlearn", "retention")
    for subset in ("train", "val")
)
_SPLITS = {"tofu": _TOFU_SPLITS, "knowundo": _KNOWUNDO_SPLITS}


def read_benchmark(spec: DataSpec, data_root: str | None) -> list[Record]:
    """Rows of a `tofu:` or `knowundo:` spec.

    Args:
        spec: its kind is `tofu` or `knowundo`.
        data_root: folder that holds `tofu/full.json`, `knowundo/privacy/unlearn_train.json`, ...; None stands for
            the environment variable FILLM_DATA.

    Raises:
        DataError: if the split does not exist, its file cannot be used, or the Hub cannot be reached.
        UsageError: if the data root is no folder.
    """
    root = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    here: list[str] = []
    if root:
        flag = "--data-root" if data_root else DATA_ROOT_VARIABLE
        folder = expanded(root)
        if not folder.is_dir():
            raise UsageError(f"{flag} {root}: no such folder; it should hold {spec.kind}/{spec.name}.json")
        files = _files_of(folder / spec.kind)
        if spec.name in files:
            return read_records(str(files[spec.name]))
        here = sorted(files)
    known = _SPLITS[spec.kind]
    if spec.name not in known:
        raise DataError(f"{spec.base}: no such split; there are {', '.join(sorted({*known, *here}))}")
    try:
        if spec.kind == "tofu":
            return load_from_hub("locuslab/TOFU", spec.name, "train")
        return _knowundo_from_hub(spec.name)
    except DataError as error:
        raise DataError(
            f"{spec.base}: {error}; give --data-root (or {DATA_ROOT_VARIABLE}) a folder that holds "
            f"{spec.kind}/{spec.name}.json"
        ) from None


def _files_of(folder: Path) -> dict[str, Path]:
    """Split name -> file, for every .json, .jsonl or .parquet under the benchmark's folder; .json comes first."""
    found: dict[str, Path] = {}
    for extension in (".json", ".jsonl", ".parquet"):
        for file in sorted(folder.rglob(f"*{extension}")):
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return found


def load_from_hub(name: str, config: str | None, split: str | None) -> list[Record]:
    """Rows of a Hub data set through `datasets`; code of the repository is never run.

    Args:
        name: `owner/name`.
        config: configuration; None for the default one.
        split: split; None if the data set has one only.

    Raises:
        DataError: if `datasets` cannot load it, or the split has to be named.
    """
    try:
        import datasets  # heavy, and needed for the Hub alone
    except ImportError:
        raise DataError(f"{name}: the package datasets is not installed; pip install datasets") from None
    try:
        announce(name, "not among the files here")
        with quiet_loggers():
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the Hub client, its HTTP library and the file readers each raise their own kinds
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(f"{name} could not be had from the Hub ({type(error).__name__}: {reason})") from None
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            raise DataError(f"{name} has the splits {', '.join(loaded)}; name one: hub:{name}:{config or ''}:SPLIT")
        (loaded,) = loaded.values()
    return [(row, None) for row in loaded]


def _knowundo_from_hub(name: str) -> list[Record]:
    """On the Hub a domain is a configuration, unlearn and retention are splits of one row, train and val its cells."""
    domain, _, rest = name.partition("/")
    part, _, subset = rest.rpartition("_")
    rows: list[Record] = []
    for row, _ in load_from_hub("zjunlp/KnowUnDo", domain, part):
        if not isinstance(row, Mapping) or subset not in row:
            raise DataError(f"zjunlp/KnowUnDo has no column {subset!r} in {domain}, {part}: its layout has changed")
        rows += [(inner, None) for inner in _unnest(row[subset])]
    return rows


def _unnest(cell: Any) -> Iterable[Any]:
    """A list of rows that `datasets` may hand out as a mapping of columns."""
    if isinstance(cell, Mapping):
        return [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    return cell
