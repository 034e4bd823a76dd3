"""Makes the model that is to forget: `python -m fillm.finetune`, or `finetune_model` in Python."""

from importlib import import_module
from typing import Any

_HOMES = {"FinetuneConfig": "config", "FinetuneResult": "run", "finetune_model": "run"}
__all__ = ["FinetuneConfig", "FinetuneResult", "finetune_model"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fillm.finetune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fillm.finetune' has no attribute {name!r}")
