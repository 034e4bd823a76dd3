"""What is ranked: small models of several families, trained on rows of one of two data sets until they recite them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from benchmarks.compression.settings import CompressionConfig
from benchmarks.end_to_end.settings import BenchConfig
from benchmarks.end_to_end.workload import RECIPE, Workload, load_workload, trained_folder
from fillm.capture import Capture, verify
from fillm.data import load_rows
from fillm.errors import UsageError
from fillm.models import catalogue
from fillm.rank.config import RankConfig
from fillm.rank.console import Console
from fillm.rank.default_model import cache_folder
from fillm.rank.passes import Passes
from fillm.rank.scoring import Job

FAMILIES = ("llama", "gpt2", "qwen3")
MAIN_SHARE = 0.5  # of the time


@dataclass(frozen=True)
class Planned:
    """A workload before its model is there.

    Attributes:
        name: family and data set.
        forget, retain: data specs.
        architecture: `small`, or a model's configuration; None where `model` is a folder.
        weight: its part of the time, beside the others'.
    """

    name: str
    forget: str
    retain: str
    architecture: str | PretrainedConfig | None
    weight: float
    model: str | None = None


def planned(config: CompressionConfig) -> list[Planned]:
    """The workloads of the settings, the main one first.

    Raises:
        UsageError: if `--workloads` names others.
    """
    if config.model is not None:
        found = [Planned("given", str(config.forget), str(config.retain), None, 1.0, config.model)]
    elif config.quick:
        specs = ("fictional-small:forget05[:3]", "fictional-small:retain95[:10]")
        found = [
            Planned(f"{family}-fictional", *specs, family_config(family, 16, 1, 300), 1.0) for family in FAMILIES[:2]
        ]
    else:
        found = _study(bool(config.data_root or os.environ.get("FILLM_DATA")))
    if config.workloads is None:
        return found
    names = [name.strip() for name in config.workloads.split(",")]
    known = {one.name: one for one in found}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--workloads: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in known if name in names]


def _study(tofu: bool) -> list[Planned]:
    large = {"tofu": ("tofu:full[3960:]", "tofu:full[3600:3960]"),
             "fictional": ("fictional-small:forget05", "fictional-small:retain95[:360]")}  # fmt: skip
    few = {"tofu": ("tofu:full[3960:3980]", "tofu:full[3600:3720]"),
           "fictional": ("fictional-small:forget05[:20]", "fictional-small:retain95[:120]")}  # fmt: skip
    sets = ("tofu", "fictional") if tofu else ("fictional",)
    names = [(family, data) for data in sets for family in FAMILIES]
    rest = (1.0 - MAIN_SHARE) / (len(names) - 1)
    main = Planned(f"{names[0][0]}-{names[0][1]}", *large[names[0][1]], "small", MAIN_SHARE)
    return [main, *(Planned(f"{f}-{d}", *few[d], family_config(f, 128, 4, 2048), rest) for f, d in names[1:])]


def family_config(family: str, hidden: int, layers: int, vocab: int) -> PretrainedConfig:
    """A small model of one family; no dropout, for it is to recite its rows."""
    if family == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
        return GPT2Config(vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=4, n_positions=1024, **drop)
    shared = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
              "intermediate_size": hidden * 11 // 4, "max_position_embeddings": 1024,
              "tie_word_embeddings": False}  # fmt: skip
    if family == "qwen3":
        return Qwen3Config(**shared, num_key_value_heads=2, head_dim=hidden // 4)
    return LlamaConfig(**shared, num_key_value_heads=4)


def trained(plan: Planned, config: CompressionConfig, say: Callable[[str], None]) -> str:
    """The folder of a workload's model, made once and kept in the cache."""
    if plan.model is not None:
        return plan.model
    rows = [row for spec in (plan.retain, plan.forget) for row in load_rows(spec, data_root=config.data_root)]
    recipe: dict[str, Any] = {**RECIPE, "architecture": plan.architecture}
    if config.quick:
        recipe |= {"epochs": 2, "target_loss": 1e-9}
    if isinstance(plan.architecture, str):
        return str(trained_folder(rows, recipe, say))
    identity = {**recipe, "architecture": plan.architecture.to_dict()}
    folder = cache_folder() / f"bench-architecture-{plan.name}-{plan.architecture.vocab_size}"
    plan.architecture.save_pretrained(folder)
    return str(trained_folder(rows, {**recipe, "architecture": str(folder)}, say, identity))


def load(plan: Planned, config: CompressionConfig, say: Callable[[str], None]) -> tuple[Workload, Job]:
    """The model and its samples, ready for passes; subsets of the retain set are its first samples, drawn at random.

    Raises:
        FillmError: as the data and model rooms do.
    """
    bench = BenchConfig(
        model=trained(plan, config, say),
        tokenizer=config.tokenizer,
        forget=plan.forget,
        retain=plan.retain,
        data_root=config.data_root,
        threads=config.threads,
    )
    work = load_workload(bench)
    order = np.random.default_rng(config.seed).permutation(len(work.retain)).tolist()
    retain = work.retain.subset(order)
    scope = catalogue(work.model)
    capture = Capture(work.model, [info.name for info in scope])
    verify(capture, retain)
    ranked = RankConfig(damping=config.damping, seed=config.seed)
    return work, Job(ranked, work.model, scope, capture, work.forget, retain, Passes(Console.silent()))


def retain_counts(total: int, counts: Sequence[int]) -> list[int]:
    """The sizes of the subsets of a retain set, itself the last."""
    return [*(n for n in counts if n < total), total]


def model_name(work: Workload) -> str:
    """The family, as transformers calls it."""
    return str(work.model.config.model_type)


def parts_folder(out: str) -> Path:
    """Where finished workloads wait for the others."""
    return Path(out) / "compression-parts"
