"""The embedded default: a small Llama that knows the fictional authors by heart, made on first use and kept."""

import fcntl
import os
from pathlib import Path

import fillm
from fillm.errors import RunFolderError
from fillm.finetune import finetune_model
from fillm.rank.console import Console

DEFAULT_DATA = "fictional-small:full"
DEFAULT_FORGET = "fictional-small:forget05"
DEFAULT_RETAIN = "fictional-small:retain95"
RECIPE = {"architecture": "tiny", "epochs": 24, "batch_size": 32, "lr": 4e-3, "target_loss": 0.08}


def cache_folder() -> Path:
    """`FILLM_CACHE`, else the user's cache folder."""
    base = os.environ.get("FILLM_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fillm"


def default_folder() -> Path:
    """Where the embedded default model of this version is, once it is made."""
    return cache_folder() / f"default-{fillm.__version__}"


def default_model(console: Console) -> Path:
    """The folder of the embedded default model; trains it if it is not there yet.

    Raises:
        InterruptedRun: stopped while training; the next call continues.
    """
    path = default_folder()
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.parent / f"{path.name}.lock", "w")  # noqa: SIM115 (held until the model is there)
    except OSError as error:
        raise RunFolderError(f"{path.parent}: cannot be written ({error.strerror}); set FILLM_CACHE") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's model
        if not path.exists():
            console.note(f"making the embedded default model, once: {path}")
            begun = path.with_name(f"{path.name}.partial").exists()
            made = finetune_model(DEFAULT_DATA, out=str(path), resume=begun, **RECIPE)
            console.note(f"the default model recites its rows: loss {made.loss:.3f} after {made.steps} steps")
    return path
