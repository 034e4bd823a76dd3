"""From a data spec to rows, from rows to token batches; and the fictional authors, which need no download."""

from fillm.data.batches import DEFAULT_TOKENS_PER_BATCH, Batch, collate, plan_batches
from fillm.data.rows import Row, load_rows
from fillm.data.samples import Sample, SampleSet, shared_rows, take
from fillm.data.templates import DEFAULT_TEMPLATE
from fillm.data.tokens import tokenize_rows

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
