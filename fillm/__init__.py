"""Where a language model's weights hold what it must forget: ranking, masks, unlearning, evaluation.

Importing this package loads neither torch nor triton; the names below load what they need when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {"Ranking": "fillm.rank", "rank_parameters": "fillm.rank", "finetune_model": "fillm.finetune"}
__all__ = ["Ranking", "__version__", "finetune_model", "rank_parameters"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'fillm' has no attribute {name!r}")
