"""`docs/models.md` from the rows of the walk."""

from collections import Counter
from collections.abc import Sequence

from benchmarks.architectures.results import ROOT
from benchmarks.architectures.walk import OUTCOMES, ROUNDINGS, TOLERANCE, Record

PAGE = ROOT / "docs" / "models.md"
_HEAD = """\
# Models

Which architectures `fillm.rank` is right for. This page is made by `python -m benchmarks.architectures --page` from
[architectures.csv](../benchmarks/results/architectures.csv), which `python -m benchmarks.architectures` measures.

Every model type with a causal-LM class in transformers {transformers} (torch {torch}, CPU) is built small from its
configuration, with one layer of every kind that it alternates and random weights, and ranked in float32 by `soir` on
samples of different lengths. Every tensor's `u`, score and damping are compared with equations (1) to (3) of the
[method](method.md) restated in float64: plain autograd, every sample by itself. The error of a model is that of its
worst tensor, relative; it is right up to {tolerance:.0e}, or {roundings:g} times what plain autograd in float32 is off
by. The error is infinite where a score is missing, NaN, or found where float64 has no gradient. Tensors whose
gradients are less than a millionth of the model's largest are rounding in float32: fillm has to find no more than that
there.
"""
_COLUMNS = """\
* **fast**: the share of parameters that a fast rule covers, parameters that no gradient reaches (the other modalities'
  of a multi-modal model) included. The others take batch-1 autograd, which is exact and slower; why, stands at the
  [end](#without-a-fast-rule).
* **batched**: whether samples share batches. `no`: they influence each other in this model, and fillm runs them one by
  one.
"""


def share(record: Record) -> float:
    """Of the parameters, how much a fast rule covers."""
    return int(record["covered_parameters"]) / int(record["parameters"])


def summary(records: Sequence[Record]) -> str:
    """What the page says first: how many are right, and how much a fast rule covers."""
    counts = Counter(record["outcome"] for record in records)
    ranked = [record for record in records if record["covered_parameters"]]
    built = [record for record in records if record["outcome"] != "not buildable"]
    covered, every = (sum(int(record[name]) for record in ranked) for name in ("covered_parameters", "parameters"))
    batched = sum(record["together"] == "yes" for record in ranked)
    return (
        f"Of {len(records)} architectures {len(built)} were built, and {counts['ok']} of them "
        f"({_percent(counts['ok'] / len(built))}) equal float64. A fast rule covers {_percent(covered / every)} of "
        f"all parameters and {_percent(sum(map(share, ranked)) / len(ranked))} of a model's on average; samples share "
        f"batches in {batched} of {len(ranked)}."
    )


def page(records: Sequence[Record]) -> str:
    """The whole page, Markdown."""
    versions = {name: ", ".join(sorted({record[name] for record in records})) for name in ("transformers", "torch")}
    parts = [_HEAD.format(tolerance=TOLERANCE, roundings=ROUNDINGS, **versions), summary(records)]
    for outcome in OUTCOMES[1:]:
        chosen = [record for record in records if record["outcome"] == outcome]
        if chosen:
            lines = [f"| `{record['model_type']}` | {_escaped(record['reason'])} |" for record in chosen]
            parts.append("\n".join([f"## {outcome.capitalize()}", "", "| model type | reason |", "|---|---|", *lines]))
    parts.append(f"## Right\n\n{_COLUMNS}")
    lines = ["| model type | class | parameters | fast | batched | largest error |", "|---|---|---:|---:|---|---:|"]
    lines += [
        f"| `{record['model_type']}` | {record['class']} | {int(record['parameters']):,} | {_percent(share(record))} "
        f"| {record['together']} | {record['largest_error']} |"
        for record in records
        if record["outcome"] == "ok"
    ]
    parts.append("\n".join(lines))
    slow = [record for record in records if record["fallback"]]
    if slow:
        lines = [
            f"| `{record['model_type']}` | {_escaped(record['fallback'].replace('; ', '<br>'))} |" for record in slow
        ]
        head = ["## Without a fast rule", "", "| model type | tensors, and why |", "|---|---|"]
        parts.append("\n".join([*head, *lines]))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _percent(value: float) -> str:
    """Rounded down: what is not all never reads 100 %."""
    return f"{int(value * 1000) / 10:g} %"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
