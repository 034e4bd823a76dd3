"""What the `run.yaml` of every command holds: its settings, what it was made from, and what it ran on."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import fillm
from fillm.config import flag_name, to_yaml
from fillm.documents import parse_yaml, read_text
from fillm.errors import RunFolderError
from fillm.runs.state_files import check_file, file_sha256

RUN_RECORD = "run.yaml"  # what every finished run folder holds, and by which it is known
_MARK = "# sha256 of what follows: "
_PACKAGES = ("transformers", "tokenizers", "safetensors", "numpy")
# What was said about the folder that lay there is no part of what a replay repeats.
_NOT_REPEATED = ("resume", "overwrite", "debug")


def run_record(
    config: Any, fingerprints: Mapping[str, str | None], skipped_rows: list[str], device: torch.device
) -> dict[str, Any]:
    """The part of `run.yaml` that no command is without; a command adds its own.

    Args:
        config: the command's dataclass, every setting resolved.
        fingerprints: of weights and data, by what they are of; None for what the run did without.
        skipped_rows: `where: why` of every row that was left out.
        device: that the run computed on.
    """
    settings = dataclasses.asdict(config)
    return {
        "settings": {name: False if name in _NOT_REPEATED else value for name, value in settings.items()},
        "fingerprints": dict(fingerprints),
        "skipped_rows": list(skipped_rows),
        "device": str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "fillm": fillm.__version__,
            "torch": str(torch.__version__),  # with the build, which the package's own version may leave out
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }


def run_identity(config: Any, fingerprints: Mapping[str, str | None], free: Collection[str]) -> dict[str, str]:
    """What a resumed run must share with the interrupted one, for `RunFolder.check_identity`.

    Args:
        config: the command's dataclass, every setting resolved.
        fingerprints: as in `run_record`.
        free: settings that say where and how the run goes on, not what it computes.

    Returns:
        Settings by the name of their flag, and `<name> fingerprint`.
    """
    named = {flag_name(name): str(value) for name, value in dataclasses.asdict(config).items() if name not in free}
    return {**named, **{f"{name} fingerprint": str(value) for name, value in fingerprints.items()}}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """`run.yaml` in a folder; the last file a run writes. Its first line is the sha256 of the rest.

    Args:
        folder: with all other files of the run.
        record: what it says. Where it has no `files`, it gets size and sha256 of every other file but weights.

    Raises:
        OSError: if the disk refuses.
    """
    if "files" not in record:
        record = {**record, "files": checksums(path for path in folder.iterdir() if path.suffix != ".safetensors")}
    text = to_yaml(record)
    (folder / RUN_RECORD).write_text(f"{_MARK}{_sha256(text)}\n{text}", encoding="utf-8")


def checksums(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of files by name, folders left out."""
    files = sorted(path for path in paths if path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}


def read_record(path: Path, remedy: str) -> Any:
    """What a `run.yaml` says, compared with the sha256 in its first line where that is one.

    One that was written or changed by hand has none, and is taken at its word.

    Raises:
        RunFolderError: if it cannot be read or is damaged; ends with `remedy`.
    """
    try:
        text = read_text(path)
        mark, _, rest = text.partition("\n")
        if _MARK.lstrip("# ") in mark and mark != _MARK + _sha256(rest):
            raise ValueError("its checksum differs; if it was changed by hand, take out its first line")
        return parse_yaml(text)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: damaged ({' '.join(str(error).split())}); {remedy}") from None


def check_recorded(path: Path, record: Mapping[str, Any], remedy: str) -> None:
    """Refuses a file of a run's folder that is not the one that its record tells of; one it does not tell of is taken.

    Raises:
        RunFolderError: naming the file; ends with `remedy`.
    """
    files = record.get("files")
    entry = files.get(path.name) if isinstance(files, Mapping) else None
    if isinstance(entry, Mapping) and {"sha256", "bytes"} <= set(entry):
        check_file(path, entry["sha256"], entry["bytes"], remedy)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
