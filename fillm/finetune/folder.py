"""The run folder: built in a sibling `NAME.partial`, renamed when whole.

Whatever moment a run dies at, the folder of that name is either the old one or the new one, and what has been computed
lies in the sibling, from which `--resume` continues.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import fillm
from fillm.config import to_yaml
from fillm.errors import RunFolderError
from fillm.finetune.checkpoint import LOG_COLUMNS

_RUN, _LOG, _CHECKPOINT = "run.yaml", "log.parquet", "checkpoint.safetensors"
_COUNTS = ("step", "epoch", "samples", "tokens")
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """Where a training keeps its state and leaves its result.

    Args:
        out: the folder the finished model is to have.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        if not self.out.name:
            raise RunFolderError(f"--out {out}: is the root of the file system; name a folder in it")
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._replaced = self.out.with_name(self.out.name + ".replaced")
        self.checkpoint = self.partial / _CHECKPOINT

    def open(self, resume: bool, overwrite: bool) -> None:
        """Makes the partial folder ready, empty or with what an interrupted run left.

        Raises:
            RunFolderError: something is there that the flags do not allow to continue or to replace.
        """
        # Leave to replace, once given, holds for the run that continues the one it was given to.
        may_replace = overwrite or (resume and bool((self.record() or {}).get("replaces")))
        if self.out.exists() and not may_replace:
            raise RunFolderError(f"{self.out}: exists already; choose another --out, or give --overwrite to replace it")
        if self.out.exists() and not ((self.out / _RUN).is_file() or _is_empty(self.out)):
            raise RunFolderError(f"{self.out}: is not a run's folder (no {_RUN}), so --overwrite leaves it alone")
        if self.partial.exists() and overwrite:
            shutil.rmtree(self.partial)
        if self.partial.exists() and not resume:
            raise RunFolderError(f"{self.partial}: an interrupted run; --resume continues it, --overwrite discards it")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{self.partial}: cannot be made: {error.strerror}") from None

    def record(self) -> dict[str, Any] | None:
        """What `run.yaml` of the partial folder says, `None` if there is none."""
        return read_record(self.partial)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """`run.yaml`, whole or not at all."""
        unfinished = self.partial / (_RUN + ".tmp")
        try:
            unfinished.write_text(to_yaml(record), encoding="utf-8")
            os.replace(unfinished, self.partial / _RUN)
        except OSError as error:
            raise RunFolderError(f"{self.partial / _RUN}: cannot be written: {error.strerror}") from None

    def write_log(self, log: list[list[float]]) -> None:
        """`log.parquet`: one row a step, columns `LOG_COLUMNS`; counts int64, the rest float64, null for NaN."""
        columns = list(zip(*log, strict=True))
        arrays = [
            pa.array([int(value) for value in column], type=pa.int64())
            if name in _COUNTS
            else pa.array(column, type=pa.float64(), from_pandas=True)
            for name, column in zip(LOG_COLUMNS, columns, strict=True)
        ]
        pq.write_table(pa.table(arrays, names=list(LOG_COLUMNS)), self.partial / _LOG)

    def publish(self) -> None:
        """Gives the whole partial folder its final name; what had that name is deleted only afterwards."""
        self.checkpoint.unlink(missing_ok=True)
        for weights in self.partial.rglob("*.safetensors"):
            shutil.copymode(self.partial / _RUN, weights)  # written readable by their owner alone
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        if self.out.exists():
            os.rename(self.out, self._replaced)
        os.rename(self.partial, self.out)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)


def read_record(folder: Path) -> dict[str, Any] | None:
    """A folder's `run.yaml`, `None` if there is none.

    Raises:
        RunFolderError: it cannot be read.
    """
    path = folder / _RUN
    if not path.is_file():
        return None
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise RunFolderError(f"{path}: is not a run's record")
    return record


def versions() -> dict[str, str]:
    """Versions of python, this package and what it computes with."""
    return {
        "python": platform.python_version(),
        "fillm": fillm.__version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
