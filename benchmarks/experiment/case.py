"""One model that recites its rows: small ones of several families, made once and kept in the cache, or a given one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GPTNeoXConfig, MistralConfig, Olmo2Config, PhiConfig, PretrainedConfig

from benchmarks.compression.workloads import FAMILIES as STUDIED
from benchmarks.compression.workloads import family_config
from benchmarks.end_to_end.workload import RECIPE, trained_folder
from benchmarks.experiment.settings import ExperimentConfig, Plan
from benchmarks.part import part_of
from benchmarks.unlearning.study import Recited
from fillm.data import Row, load_rows
from fillm.errors import UsageError
from fillm.finetune.architectures import new_model
from fillm.models import load_model, load_tokenizer
from fillm.rank.default_model import cache_folder

FAMILIES = (*STUDIED, "mistral", "gpt_neox", "olmo2", "phi")


@dataclass(frozen=True, kw_only=True)
class Case(Recited):
    """A model, its rows, and what it is called.

    Attributes:
        family: or the name of a given model.
        quick: whether it only tries the code.
    """

    family: str
    quick: bool


def cases(config: ExperimentConfig, plan: Plan, say: Callable[[str], None]) -> Iterator[Case]:
    """All models of a plan, or the command's part of them.

    Raises:
        FillmError: as loading models and data does.
    """
    rows = {name: load_rows(spec, data_root=config.data_root) for name, spec in plan.data.items()}
    # Seeds first: where there is no time for all, every family has had some.
    pairs = [(family, seed) for seed in plan.seeds for family in plan.families]
    for family, seed in part_of(pairs, config.part):
        yield _given(config, rows, seed) if config.model else _recited(config, plan, rows, family, seed, say)


def _given(config: ExperimentConfig, rows: dict[str, list[Row]], seed: int) -> Case:
    name = str(config.model)

    def base() -> Path:
        if config.base_model is None:
            raise UsageError("this study looks at shifts: give --base-model")
        return Path(config.base_model)

    model = load_model(name, device=config.device)
    return Case(
        seed=seed, model=model, tokenizer=load_tokenizer(name), rows=rows, ranked=rows, base=base,
        family=Path(name).name, quick=config.quick,
    )  # fmt: skip


def _recited(
    config: ExperimentConfig,
    plan: Plan,
    rows: dict[str, list[Row]],
    family: str,
    seed: int,
    say: Callable[[str], None],
) -> Case:
    size = plan.model
    architecture = config_of(family, size["hidden"], size["layers"], size["vocab"])
    recipe: dict[str, Any] = {**RECIPE, "epochs": size["epochs"], "target_loss": size["target_loss"], "seed": seed}
    place = cache_folder() / f"experiment-{family}-{size['hidden']}-{size['layers']}-{size['vocab']}"
    architecture.save_pretrained(place)
    identity = {**recipe, "architecture": architecture.to_dict()}
    learned = [*rows["retain"], *rows["forget"]]
    folder = trained_folder(learned, {**recipe, "architecture": str(place)}, say, identity)
    tokenizer = load_tokenizer(str(folder))

    def base() -> Path:
        path = cache_folder() / f"{folder.name}-untrained"
        if not (path / "config.json").exists():
            new_model(
                config_of(family, size["hidden"], size["layers"], size["vocab"]), tokenizer, seed
            ).save_pretrained(path)
        return path

    return Case(
        seed=seed, model=load_model(str(folder), device="cpu"), tokenizer=tokenizer, rows=rows, ranked=rows, base=base,
        family=family, quick=config.quick,
    )  # fmt: skip


def config_of(family: str, hidden: int, layers: int, vocab: int) -> PretrainedConfig:
    """A small model of one family; no dropout, for it is to recite its rows."""
    if family == "gpt_neox":
        return GPTNeoXConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
                             intermediate_size=4 * hidden, max_position_embeddings=1024)  # fmt: skip
    if family == "mistral":
        return MistralConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
                             num_key_value_heads=2, intermediate_size=hidden * 11 // 4, max_position_embeddings=1024,
                             sliding_window=None, tie_word_embeddings=False)  # fmt: skip
    if family == "phi":
        return PhiConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
                         intermediate_size=4 * hidden, max_position_embeddings=1024, embd_pdrop=0.0,
                         resid_pdrop=0.0, attention_dropout=0.0)  # fmt: skip
    if family == "olmo2":
        return Olmo2Config(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
                           num_key_value_heads=4, intermediate_size=hidden * 11 // 4, max_position_embeddings=1024,
                           tie_word_embeddings=False)  # fmt: skip
    return family_config(family, hidden, layers, vocab)
