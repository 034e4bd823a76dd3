"""What the `run.yaml` of every command holds: its settings, what it was made from, and what it ran on."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

import fillm
from fillm.config import flag_name, to_yaml

RUN_RECORD = "run.yaml"  # what every finished run folder holds, and by which it is known
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
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
    """`run.yaml` in a folder; the last file a run writes.

    Raises:
        OSError: if the disk refuses.
    """
    (folder / RUN_RECORD).write_text(to_yaml(record), encoding="utf-8")
