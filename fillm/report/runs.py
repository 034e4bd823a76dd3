"""What a finished run left, read back: its record, its tables, its summary."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

import fillm
from fillm.documents import read_json_document
from fillm.errors import RunFolderError, UsageError
from fillm.paths import expanded
from fillm.report.result_files import REMEDY, experiment_of, made_by, read_result, results_in
from fillm.report.shapes import check_settings, check_summary, check_table
from fillm.runs import RUN_RECORD, check_recorded, read_record

Command = Literal["rank", "unlearn", "evaluate", "finetune", "compression", "experiment"]

_SUMMARIES = {"unlearn": "verification.json", "evaluate": "summary.json"}
_UNSEEN, _JOINERS = ("Cc", "Cf", "Cs"), "\u200c\u200d"  # joiners belong to words and to emoji


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder, or its result file.
        name: the folder's name, or the file's stem; `load_runs` makes it the only one of its kind.
        command: what made it.
        record: `run.yaml`; of a result file, what its metadata or its last columns say of how it was made (`made`), and
            title, claim and source of the experiment that it is of, where they are known (`study`).
        tables: every Parquet file of the folder by its stem (`ranking`, `samples`, `log`, `rows`, ...), or the one
            table of a result file.
        summary: of `rank`, `ranking` of the record; of `unlearn`, `verification.json`; of `evaluate`, `summary.json`;
            of `finetune`, `result` of the record; of an experiment, `summary.json` if there is one.
    """

    path: Path
    name: str
    command: Command
    record: dict[str, Any]
    tables: dict[str, pa.Table]
    summary: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the record, empty for a result file."""
        return self.record.get("settings") or {}

    @property
    def study(self) -> dict[str, str]:
        """Of the experiment: `title`, `claim`, `source`; empty where nothing tells them."""
        return self.record.get("study") or {}

    def place_of(self, named: str) -> Path:
        """Where a path of its settings leads.

        A relative one starts in the folder in which the command was given, which a relative `out` tells; where that
        finds nothing, in the current one.
        """
        path, out = expanded(named), Path(str(self.settings.get("out") or "/"))
        if path.is_absolute() or out.is_absolute() or self.path.parts[-len(out.parts) :] != out.parts:
            return path
        found = self.path.parents[len(out.parts) - 1] / path
        return found if found.exists() else path

    def fingerprint(self, of: str = "model") -> str | None:
        """A fingerprint of the record; of `rank`, `model` is the model that was ranked."""
        return (self.record.get("fingerprints") or {}).get(of)


def load_runs(paths: Sequence[str | Path], say: Callable[[str], None] = lambda line: None) -> list[Run]:
    """Every run once, in the order given, under names that tell them apart.

    Args:
        paths: run folders, result files, and folders of result files, which stand for those in them that are known.
        say: told what a folder has beside these.

    Raises:
        UsageError: if there is none.
        RunFolderError: as `load_run`.
    """
    if not paths:
        raise UsageError("give at least one run folder or result file")
    given = [expanded(path).resolve() for path in paths]
    runs = [load_run(path) for path in dict.fromkeys(one for path in given for one in _results(path, say))]
    for depth in range(2, 1 + max(len(run.path.parts) for run in runs)):
        names = [run.name for run in runs]
        runs = [
            replace(run, name=_visible("/".join(run.path.parts[-depth:]))) if names.count(run.name) > 1 else run
            for run in runs
        ]
    return runs


def _results(path: Path, say: Callable[[str], None]) -> list[Path]:
    """The known result files of a folder that is no run; any other path itself."""
    if not path.is_dir() or (path / RUN_RECORD).exists():
        return [path]
    known, others = results_in(path)
    if known and others:
        say(f"{path}: left out {', '.join(others)}, of no study that can be reported")
    return known or [path]


def load_run(path: str | Path) -> Run:
    """Reads a run folder of any command, or a `.parquet` or `.csv` result file of a benchmark.

    Raises:
        RunFolderError: one line: nothing there, none of ours, not finished, of a newer version, or damaged.
    """
    path = expanded(path).resolve()
    if path.is_file():
        return _result_file(path)
    record = _record(path)
    command = _command(path, record)
    summary = _summary(path, command, record)
    tables = {file.stem: _table(file, record) for file in sorted(path.glob("*.parquet"))}
    for stem, table in tables.items():
        check_table(path / f"{stem}.parquet", command, table, REMEDY)
    needed = {"rank": "ranking", "unlearn": "log", "evaluate": "rows", "finetune": "log"}.get(command)
    if needed is not None and needed not in tables and not _scored_from_log(command, record):
        raise RunFolderError(f"{path / needed}.parquet: missing; {REMEDY}")
    return Run(path, _visible(path.name), command, record, tables, summary)


def _visible(name: str) -> str:
    """A name of which every character stands for itself alone, in one line.

    What is no character, or turns the direction of what follows, becomes a sign that there was something.
    """
    signs = {c: " " if c.isspace() else "\ufffd" for c in name if unicodedata.category(c) in _UNSEEN}
    return "".join(c if c in _JOINERS else signs.get(c, c) for c in name)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RUN_RECORD
    if not path.is_file():
        if folder.name.endswith(".partial") or folder.with_name(folder.name + ".partial").is_dir():
            raise RunFolderError(f"{folder}: the run is not finished; continue it with --resume")
        if not folder.is_dir():
            raise RunFolderError(f"{folder}: no such folder")
        raise RunFolderError(f"{folder}: no {RUN_RECORD} in it; give the folder of a finished run, or of result files")
    record = read_record(path, REMEDY)
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise RunFolderError(f"{path}: not the record of a run; give a folder that a command of fillm wrote")
    check_settings(path, record, REMEDY)
    versions = record.get("versions")
    made_by = str(versions.get("fillm", "")) if isinstance(versions, dict) else ""
    if _version(made_by) > _version(fillm.__version__):
        raise RunFolderError(f"{folder}: made by fillm {made_by}, this is {fillm.__version__}; update fillm to read it")
    return record


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _command(folder: Path, record: Mapping[str, Any]) -> Command:
    result = record.get("result")
    if isinstance(record.get("experiment"), dict | str):
        return "experiment"
    if isinstance(record.get("ranking"), dict):
        return "rank"
    if (folder / "verification.json").is_file():
        return "unlearn"
    if (folder / "summary.json").is_file():
        return "evaluate"
    if isinstance(result, dict) and "epoch_losses" in result:
        return "finetune"
    raise RunFolderError(f"{folder}: of no command that can be reported (rank, unlearn, evaluate, finetune)")


def _summary(folder: Path, command: Command, record: Mapping[str, Any]) -> dict[str, Any]:
    if command in ("rank", "finetune"):
        summary = dict(record["ranking" if command == "rank" else "result"])
        check_summary(folder / RUN_RECORD, command, summary, REMEDY)
        return summary
    path = folder / _SUMMARIES.get(command, "summary.json")
    if command == "experiment" and not path.is_file():
        return {}
    try:
        check_recorded(path, record, REMEDY)
        summary = read_json_document(path)
        if not isinstance(summary, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: damaged ({' '.join(str(error).split())}); {REMEDY}") from None
    check_summary(path, command, summary, REMEDY)
    return summary


def _table(path: Path, record: Mapping[str, Any]) -> pa.Table:
    """A Parquet file, checked against the checksum of the record where there is one."""
    check_recorded(path, record, REMEDY)
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise RunFolderError(f"{path}: damaged ({' '.join(str(error).split())}); {REMEDY}") from None


def _scored_from_log(command: Command, record: Mapping[str, Any]) -> bool:
    """Whether an evaluation read a published log, of which it has no rows."""
    return command == "evaluate" and record["settings"].get("from_log") is not None


def _result_file(path: Path) -> Run:
    kind, table = read_result(path)
    record: dict[str, Any] = {"made": made_by(table)}
    if kind.command == "experiment" and (told := experiment_of(path)):
        record["study"] = told
    tables = {path.stem: table.replace_schema_metadata(None)}
    return Run(path, _visible(path.stem), kind.command, record, tables, {})
