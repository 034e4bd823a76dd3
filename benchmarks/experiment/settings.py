"""The settings of `python -m benchmarks.experiment`, and what a file of `benchmarks/experiments` says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.part import check_part
from fillm.config import arguments, flag_name, option
from fillm.errors import UsageError

PROGRAM = "python -m benchmarks.experiment"
FOLDER = Path(__file__).resolve().parents[1] / "experiments"
FREE = ("resume", "minutes", "threads", "part", "out", "debug")  # do not change what is measured


@dataclass(frozen=True)
class ExperimentConfig:
    """Runs one study over models and seeds, and writes its rows and its figure."""

    experiment: tuple[str, ...] = arguments("one of benchmarks/experiments, without .yaml", "NAME")
    families: str | None = option(None, "comma-separated model families (default: the file's)", "NAMES")
    seeds: int | None = option(None, "models of each family (default: the file's)", "N")
    model: str | None = option(None, "a causal LM instead of the small models: a folder or a Hub id", "MODEL")
    base_model: str | None = option(None, "that model before it learned the rows, for shifts", "MODEL")
    device: str = option("cpu", "where --model runs", "DEVICE")
    forget: str | None = option(None, "data spec of the rows to forget (default: the file's)", "SPEC")
    retain: str | None = option(None, "data spec of the rows to keep (default: the file's)", "SPEC")
    data_root: str | None = option(None, "folder that holds tofu/ (or set FILLM_DATA)", "DIR")
    part: str | None = option(None, "I/N: only every Nth model from the Ith (1-based), to share the work", "I/N")
    threads: int | None = option(None, "torch threads (default: torch's own choice)", "N")
    minutes: float | None = option(None, "stop after this long; --resume goes on (default: no bound)", "X")
    quick: bool = option(False, "one tiny model that knows nothing: whether it runs at all")
    resume: bool = option(False, "keep what an interrupted run with the same settings has finished")
    out: str = option("benchmarks/results/experiments", "folder for NAME.csv and NAME.png", "DIR")
    debug: bool = option(False, "show a traceback with every error")

    @property
    def name(self) -> str:
        """The experiment's."""
        return self.experiment[0]


@dataclass(frozen=True)
class Plan:
    """What a file of `benchmarks/experiments` says.

    Attributes:
        study: module of `benchmarks.experiment.studies`.
        title: of the figure.
        claim: what was claimed.
        source: where: the paper, as far as one is known.
        families: of models.
        seeds: of the models' weights and order of rows.
        model: `hidden`, `layers`, `vocab`, `epochs`, `target_loss`.
        data: specs of `forget` and `retain`.
        settings: of the study.
    """

    study: str
    title: str
    claim: str
    source: str
    families: tuple[str, ...]
    seeds: tuple[int, ...]
    model: Mapping[str, Any]
    data: Mapping[str, str]
    settings: Mapping[str, Any]


MODEL = {"hidden": 64, "layers": 4, "vocab": 512, "epochs": 120, "target_loss": 0.1}
QUICK_MODEL = {"hidden": 32, "layers": 2, "vocab": 300, "epochs": 1, "target_loss": None}


def read_plan(config: ExperimentConfig, known_families: tuple[str, ...]) -> Plan:
    """The experiment's file with the command's settings in their places.

    Raises:
        UsageError: for a name that is no experiment, a key that means nothing, or a setting out of range.
    """
    if len(config.experiment) != 1:
        raise UsageError(f"give one experiment of {', '.join(experiments())}")
    path = FOLDER / f"{config.name}.yaml"
    if config.name not in experiments():
        raise UsageError(f"there is no experiment {config.name}; there are {', '.join(experiments())}")
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    needed = {"study", "title", "claim", "source", "families", "seeds"}
    fields = needed | {"model", "data", "settings"}
    unknown = sorted(set(text) - fields)
    if unknown or not needed <= set(text):
        raise UsageError(
            f"{path.name}: {', '.join(unknown) or 'a key is missing'}; it takes {', '.join(sorted(fields))}"
        )
    wrong = sorted(set(text.get("model", {})) - set(MODEL))
    if wrong:
        raise UsageError(f"{path.name}: model has no {', '.join(wrong)}; it takes {', '.join(MODEL)}")
    _check(config)
    families = _words(config.families) if config.families else tuple(text["families"])
    strange = [name for name in families if name not in known_families]
    if strange:
        raise UsageError(f"--families: there is no {', '.join(strange)}; there are {', '.join(known_families)}")
    seeds = tuple(range(config.seeds)) if config.seeds else tuple(text["seeds"])
    if config.model is not None:
        families, seeds = (config.model,), seeds[:1]
    data = {name: getattr(config, name) or text.get("data", {}).get(name) or spec for name, spec in _DATA.items()}
    plan = Plan(
        text["study"], text["title"], text["claim"], text["source"], families, seeds,
        {**MODEL, **text.get("model", {})}, data, text.get("settings", {}),
    )  # fmt: skip
    return _quick(plan) if config.quick else plan


_DATA = {"forget": "fictional-small:forget05", "retain": "fictional-small:retain95[:80]"}


def experiments() -> list[str]:
    """The names there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _quick(plan: Plan) -> Plan:
    data = {name: f"{spec.partition('[')[0]}[:12]" for name, spec in plan.data.items()}
    return replace(plan, families=plan.families[:1], seeds=plan.seeds[:1], model=QUICK_MODEL, data=data)


def _check(config: ExperimentConfig) -> None:
    for name in ("seeds", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag_name(name)} {value}: give at least 1")
    for name in ("families", "seeds"):
        if config.model is not None and getattr(config, name) is not None:
            raise UsageError(f"{flag_name(name)} is of the small models and --model is one model: give one of the two")
    if config.base_model is not None and config.model is None:
        raise UsageError("--base-model goes with --model")
    check_part(config.part)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
