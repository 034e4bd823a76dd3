"""From a data spec to rows, from rows to token batches; and the fictional authors, which need no download.

The names are resolved when they are first used, so that a command's settings can be read without loading torch.
"""

from fillm.lazy import lazy_names

__all__ = [
    "DEFAULT_TEMPLATE",
    "DEFAULT_TOKENS_PER_BATCH",
    "Batch",
    "Reading",
    "Row",
    "Sample",
    "SampleSet",
    "check_fits_model",
    "collate",
    "load_rows",
    "plan_batches",
    "shared_rows",
    "take",
    "tokenize_rows",
]

__getattr__ = lazy_names(
    __name__,
    {
        "DEFAULT_TEMPLATE": "templates",
        "DEFAULT_TOKENS_PER_BATCH": "batches",
        "Batch": "batches",
        "Reading": "reading",
        "Row": "rows",
        "Sample": "samples",
        "SampleSet": "samples",
        "check_fits_model": "reading",
        "collate": "batches",
        "load_rows": "rows",
        "plan_batches": "batches",
        "shared_rows": "samples",
        "take": "samples",
        "tokenize_rows": "tokens",
    },
)
