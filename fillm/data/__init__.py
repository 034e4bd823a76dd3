"""From a data spec to rows, from rows to token batches; and the fictional authors, which need no download.

The names are resolved when they are first used, so that a command's settings can be read without loading torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "DEFAULT_TEMPLATE": "templates",
    "DEFAULT_TOKENS_PER_BATCH": "batches",
    "Batch": "batches",
    "Row": "rows",
    "Sample": "samples",
    "SampleSet": "samples",
    "collate": "batches",
    "load_rows": "rows",
    "plan_batches": "batches",
    "shared_rows": "samples",
    "take": "samples",
    "tokenize_rows": "tokens",
}
__all__ = [
    "DEFAULT_TEMPLATE",
    "DEFAULT_TOKENS_PER_BATCH",
    "Batch",
    "Row",
    "Sample",
    "SampleSet",
    "collate",
    "load_rows",
    "plan_batches",
    "shared_rows",
    "take",
    "tokenize_rows",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fillm.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fillm.data' has no attribute {name!r}")
