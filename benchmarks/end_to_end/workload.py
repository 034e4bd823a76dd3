"""What is ranked in the benchmark: one model, one forget set, one retain set, and the subset for slow pipelines."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.end_to_end.settings import BenchConfig
from fillm.data import Row, SampleSet, load_rows, tokenize_rows
from fillm.finetune import finetune_model
from fillm.models import load_model, load_tokenizer
from fillm.rank.default_model import cache_folder

FICTIONAL = ("fictional-small:forget05", "fictional-small:retain95[:360]")
TOFU = ("tofu:full[3960:]", "tofu:full[3600:3960]")
# A model that does not know its rows by heart has large retain gradients and nothing to forget.
RECIPE: dict[str, Any] = {"architecture": "small", "epochs": 60, "batch_size": 16, "target_loss": 0.05}


@dataclass(frozen=True)
class Workload:
    """The inputs that everything in the benchmark shares.

    Attributes:
        model: in eval mode, float32, on the CPU, its parameters not requiring a gradient.
        forget, retain: all samples.
        few_forget, few_retain: those of pipelines that keep every gradient; they have the lengths of all.
    """

    model: nn.Module
    forget: SampleSet
    retain: SampleSet
    few_forget: SampleSet
    few_retain: SampleSet

    @property
    def names(self) -> list[str]:
        """Every parameter tensor of the model."""
        return [name for name, _ in self.model.named_parameters()]


def resolve(config: BenchConfig, say: Callable[[str], None]) -> BenchConfig:
    """The settings with data specs and model filled in; trains the model if there is none and the cache has none.

    Raises:
        FillmError: as the data room and `finetune_model` do.
    """
    if config.forget is None or config.retain is None:
        specs = TOFU if config.data_root or os.environ.get("FILLM_DATA") else FICTIONAL
        config = dataclasses.replace(config, forget=config.forget or specs[0], retain=config.retain or specs[1])
    return config if config.model else dataclasses.replace(config, model=str(trained_model(config, say)))


def trained_model(config: BenchConfig, say: Callable[[str], None]) -> Path:
    """The folder of a model trained on all rows of both specs until it recites them, kept in the cache."""
    return trained_folder([row for spec in (config.retain, config.forget) for row in _rows(spec, config)], RECIPE, say)


def trained_folder(
    rows: Sequence[Row],
    recipe: dict[str, Any],
    say: Callable[[str], None],
    identity: dict[str, Any] | None = None,
) -> Path:
    """The folder of a model trained on some rows, kept in the cache.

    Args:
        rows: what it learns.
        recipe: settings of `finetune_model`.
        say: told when there is something to train.
        identity: stands for the recipe in the folder's name, where the recipe names a file.
    """
    made_of = repr([identity or recipe, [sorted(row.fields.items()) for row in rows]])
    path = cache_folder() / f"bench-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    if not path.exists():
        say(f"training a model on {len(rows)} rows, once")
        path.parent.mkdir(parents=True, exist_ok=True)
        finetune_model([row.fields for row in rows], out=str(path), resume=True, device="cpu", **recipe)
    return path


def load_workload(config: BenchConfig) -> Workload:
    """Reads the model and the data of resolved settings.

    Raises:
        FillmError: as the data and model rooms do.
    """
    rows = {spec: _rows(spec, config) for spec in (config.forget, config.retain)}
    ready = all("input_ids" in row.fields for found in rows.values() for row in found)
    tokenizer = None if ready else load_tokenizer(str(config.tokenizer or config.model))
    forget, retain = (
        tokenize_rows(rows[spec], tokenizer, source=spec)[: config.samples_per_set]
        for spec in (config.forget, config.retain)
    )
    model = load_model(str(config.model), device="cpu")
    few_forget, few_retain = spread(forget, config.published_forget), spread(retain, config.published_retain)
    return Workload(model, forget, retain, few_forget, few_retain)


def spread(samples: SampleSet, count: int) -> SampleSet:
    """`count` samples at even steps from the longest to the shortest, both among them; all, if there are no more."""
    order = sorted(range(len(samples)), key=lambda i: (-samples[i].num_tokens, i))
    if count >= len(order):
        return samples
    steps = max(count - 1, 1)
    return samples.subset(sorted(order[round(step * (len(order) - 1) / steps)] for step in range(count)))


def _rows(spec: str | None, config: BenchConfig) -> list[Row]:
    return load_rows(str(spec), data_root=config.data_root)
