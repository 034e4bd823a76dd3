"""The run of the retain model that Forget Quality and its like compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

from fillm.config import flag_name
from fillm.documents import read_json_document
from fillm.errors import RunFolderError, UsageError
from fillm.evaluate.metric import ANSWER
from fillm.evaluate.results import ROWS, SUMMARY
from fillm.evaluate.row_sets import FORGET
from fillm.paths import expanded
from fillm.runs import RUN_RECORD, check_recorded, read_record

# Figures that compare with the reference run.
COMPARED = ("forget_quality", "forget_quality_ks_statistic", "mia_reference_auc", "mia_reference_auc_error",
            "privacy_leakage")  # fmt: skip
_OF_NOTHING = "with itself, which says nothing of forgetting"
ITSELF, LOG_ITSELF = f"compares the model {_OF_NOTHING}", f"compares the log {_OF_NOTHING}"
_REMEDY = "evaluate the retain model anew"
_SPLIT = ("benchmark", "forget")
_SHAPES = ("num_forget", "seed", "template", "max_length")  # what makes other tokens of the same split


def compared_with_itself(summary: Mapping[str, Any], name: str) -> bool:
    """Whether a figure of a `summary.json` is noted to compare what was evaluated with itself.

    Args:
        summary: with `notes`.
        name: of the figure.
    """
    notes = summary.get("notes")
    return isinstance(notes, Mapping) and notes.get(name) in (ITSELF, LOG_ITSELF)


@dataclass(frozen=True)
class Reference:
    """A finished run folder of this command.

    Attributes:
        folder: where it is.
        settings: of the run.
        fingerprints: of its `model`, and of its data by `<row set>.<field>`.
        summary: its figures.
        rows: its `rows.parquet`.
    """

    folder: str
    settings: Mapping[str, Any]
    fingerprints: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: pyarrow.Table

    def is_of(self, model: str) -> bool:
        """Whether it is the evaluation of the model with that fingerprint."""
        return self.fingerprints.get("model") == model

    def column(self, row_set: str, name: str) -> list[Any] | None:
        """One value a row of a set, in its order; None if the run has not computed it."""
        names = self.rows.column_names
        if name not in names:
            return None
        cells = zip(self.rows["set"].to_pylist(), self.rows[name].to_pylist(), strict=True)
        found = [value for where, value in cells if where == row_set]
        return found if found and None not in found else None

    def check_same_rows(
        self, settings: Mapping[str, Any], fingerprints: Mapping[str, str], counts: Mapping[str, int]
    ) -> None:
        """Refuses a run over other forget rows.

        Args:
            settings: of the run that refers to this one.
            fingerprints: of its data.
            counts: of its rows, by row set.

        Raises:
            UsageError: names what differs.
            RunFolderError: if rows are missing from the table that the fingerprints tell of.
        """
        if self.settings.get("from_log") is not None:
            raise UsageError(
                f"--reference {self.folder}: was scored from a published log; evaluate the retain model with this "
                "command, or compare logs by --from-log and --reference-log"
            )
        self._compare(_SPLIT, settings)
        shared = [name for name in fingerprints if name.startswith(f"{FORGET}.") and name in self.fingerprints]
        if any(fingerprints[name] != self.fingerprints[name] for name in shared):
            self._compare(_SHAPES, settings)
            raise UsageError(
                f"--reference {self.folder}: its forget rows are other tokens; evaluate both models with the same data "
                "and the same --tokenizer"
            )
        there = self.rows["set"].to_pylist()
        for name, count in counts.items():
            key = f"{name}.{ANSWER}"
            if fingerprints[key] == self.fingerprints.get(key) and there.count(name) not in (0, count):
                raise _damaged(self.folder, f"{ROWS} has {there.count(name)} {name} rows, not {count}")

    def _compare(self, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        for name in names:
            if settings[name] != self.settings.get(name):
                shown = [f"{flag_name(name)} {value!r}" for value in (self.settings.get(name), settings[name])]
                raise UsageError(f"--reference {self.folder}: was made with {shown[0]}, this run has {shown[1]}")


def load_reference(folder: str) -> Reference:
    """Reads a run folder of this command.

    Raises:
        RunFolderError: no such folder, not one of this command, or damaged.
    """
    path = expanded(folder)
    if not (path / RUN_RECORD).is_file() or not (path / SUMMARY).is_file():
        absent = "is a file" if path.is_file() else "no such folder"
        found = f"no finished run of fillm evaluate (no {SUMMARY})" if path.is_dir() else absent
        raise RunFolderError(f"--reference {folder}: {found}; give the folder of the retain model's evaluation")
    try:
        record = read_record(path / RUN_RECORD, _REMEDY)
        for name in (SUMMARY, ROWS):
            check_recorded(path / name, record, _REMEDY)
        summary = read_json_document(path / SUMMARY)
        figures = {name: None if value is None else float(value) for name, value in summary.items() if name != "notes"}
        rows = pyarrow.parquet.read_table(path / ROWS, page_checksum_verification=True)
        if "set" not in rows.column_names:
            raise ValueError(f"{ROWS} does not say of which set a row is")
        return Reference(folder, dict(record["settings"]), dict(record["fingerprints"]), figures, rows)
    except RunFolderError as error:
        raise RunFolderError(f"--reference {error}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise _damaged(folder, " ".join(str(error).split())[:120]) from None


def _damaged(folder: str, reason: str) -> RunFolderError:
    return RunFolderError(f"--reference {folder}: damaged ({reason}); {_REMEDY}")
