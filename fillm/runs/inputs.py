"""What a run reads may not lie in the folder that it replaces."""

import os
from pathlib import Path
from typing import Any

from fillm.config import flag_name
from fillm.errors import RunFolderError
from fillm.paths import out_path

_READ = (
    "model", "adapter", "tokenizer", "base_model", "ranking", "mask", "forget", "retain", "data", "eval_data",
    "holdout", "reference", "idk", "store", "data_root", "from_log", "reference_log",
)  # fmt: skip


def check_inputs_outside(config: Any) -> None:
    """Refuses an `--overwrite` that would delete what the run is made from.

    Args:
        config: a command's settings. Of those that name files or folders, specs with a slice included, only what is
            there is looked at.

    Raises:
        RunFolderError: naming the first setting whose file or folder lies in `out`.
    """
    if not config.overwrite or config.out is None:
        return
    out = out_path(config.out)
    given = [(f"{flag_name(name)} {value}", value) for name in _READ if (value := getattr(config, name, None))]
    given += [(run, run) for run in getattr(config, "runs", ())]
    for told, value in given:
        path = os.path.expanduser(value.partition("[")[0])
        if os.path.exists(path) and Path(path).resolve().is_relative_to(out):
            raise RunFolderError(f"{told}: lies in {out}, which --overwrite replaces; give another --out")
