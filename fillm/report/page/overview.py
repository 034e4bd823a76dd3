"""What stands above the figures: what was run, on what, how long it took, and the headline numbers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fillm.report.figures.data import number
from fillm.report.page.tables import PageTable, page_table
from fillm.report.runs import Run

_NOUNS = {
    "rank": ("ranking", "rankings"),
    "unlearn": ("unlearning", "unlearnings"),
    "evaluate": ("evaluation", "evaluations"),
    "finetune": ("fine-tuning", "fine-tunings"),
    "compression": ("compression study", "compression studies"),
    "experiment": ("experiment", "experiments"),
}
_METRICS = {"model_utility": "Model utility", "forget_quality": "Forget quality"}


@dataclass(frozen=True)
class Card:
    """One headline number.

    Attributes:
        label: what it is.
        value: as it is shown.
        more: what has to be known about it, or empty.
    """

    label: str
    value: str
    more: str = ""


def lead(runs: Sequence[Run]) -> str:
    """One sentence on what was run."""
    counts = Counter(run.command for run in runs)
    parts = [f"{count:,} {_NOUNS[command][count > 1]}" for command, count in counts.items()]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    models = dict.fromkeys(model for run in runs if (model := _model(run)))
    return f"{listed}{f' of {_several(list(models))}' if models else ''}."


def cards(runs: Sequence[Run]) -> list[Card]:
    """The headline numbers that the runs have something for."""
    found = [
        _ranking_card(runs),
        *(_loss_card(runs, which) for which in ("forget", "retain")),
        _outside_card(runs),
        *(_metric_card(runs, name) for name in _METRICS),
        _seconds_card(runs),
        _versions_card(runs),
    ]
    return [card for card in found if card is not None]


def run_table(runs: Sequence[Run]) -> PageTable:
    """A row a run: what it was made from, how, and how long it took."""
    asked: dict[str, Callable[[Run], Any]] = {
        "run": lambda run: run.name,
        "command": lambda run: run.command,
        "model": _model,
        "forget": lambda run: _setting(run, "forget"),
        "retain": lambda run: _setting(run, "retain"),
        "data": lambda run: _setting(run, "data"),
        "benchmark": lambda run: _setting(run, "benchmark"),
        "method": lambda run: _setting(run, "method"),
        "loss": lambda run: _setting(run, "loss"),
        "seed": lambda run: run.settings.get("seed"),
        "seconds": seconds,
        "device": lambda run: run.record.get("device"),
        "fillm": lambda run: _version(run, "fillm"),
        "torch": lambda run: _version(run, "torch"),
        "transformers": lambda run: _version(run, "transformers"),
    }
    columns = {name: [value(run) for run in runs] for name, value in asked.items()}
    numbers = {"seed": pa.int64(), "seconds": pa.float64()}
    arrays = {name: pa.array(_typed(name, values), numbers.get(name, pa.string())) for name, values in columns.items()}
    return page_table(pa.table(arrays), "All runs", most=len(runs), kind="runs")


def seconds(run: Run) -> float | None:
    """How long a run computed, in seconds; None where its folder does not say."""
    for told in (run.record.get("seconds"), _mapping(run.record.get("result")).get("seconds")):
        if isinstance(told, int | float):
            return float(told)
    log = run.tables.get("log")
    if log is not None and "seconds" in log.column_names and log.num_rows:
        return log["seconds"][-1].as_py()
    return None


def duration(value: float) -> str:
    """`4.2 s`, `3 min 12 s`, `2 h 05 min`."""
    if round(value, 1) < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _ranking_card(runs: Sequence[Run]) -> Card | None:
    ranked = [run for run in runs if run.command == "rank" and run.tables["ranking"].num_rows]
    if not ranked:
        return None
    first = ranked[0]
    top = first.tables["ranking"]["name"][0].as_py()
    method = first.summary.get("method")
    others = f"; {len(ranked) - 1:,} more below" if len(ranked) > 1 else ""
    return Card("First in the ranking", str(top), f"{method}, run {first.name}{others}")


def _loss_card(runs: Sequence[Run], which: str) -> Card | None:
    told = [run.summary.get(f"{which}_loss") for run in runs if run.command == "unlearn"]
    ends = [(loss["before"], loss["after"]) for loss in told if isinstance(loss, dict)]
    if not ends:
        return None
    before, after = ([pair[i] for pair in ends] for i in (0, 1))
    return Card(f"Loss on {which} (nats a token)", f"{_range(before)} → {_range(after)}", _of(len(ends), "unlearning"))


def _outside_card(runs: Sequence[Run]) -> Card | None:
    told = [run.summary["outside_mask_bit_equal"] for run in runs if "outside_mask_bit_equal" in run.summary]
    if not told:
        return None
    value = "bit-equal" if all(told) else f"changed in {told.count(False)} of {len(told)}"
    return Card("Weights outside the mask", value, _of(len(told), "unlearning"))


def _metric_card(runs: Sequence[Run], name: str) -> Card | None:
    """What is noted of a value, such as a comparison of a model with itself, stands with it."""
    having = [run for run in runs if run.command == "evaluate" and isinstance(run.summary.get(name), int | float)]
    if not having:
        return None
    noted: dict[str, list[str]] = {}
    for run in having:
        if note := _mapping(run.summary.get("notes")).get(name):
            noted.setdefault(str(note), []).append(run.name)
    about = "".join(f"; {', '.join(names)}: {note}" for note, names in noted.items())
    values = [float(run.summary[name]) for run in having]
    return Card(_METRICS[name], _range(values), f"{_of(len(values), 'evaluation')}{about}")


def _seconds_card(runs: Sequence[Run]) -> Card | None:
    told = [value for run in runs if (value := seconds(run)) is not None]
    if not told:
        return None
    longest = f", the longest {duration(max(told))}" if len(told) > 1 else ""
    return Card("Computing time", duration(sum(told)), f"{_of(len(told), 'run')}{longest}")


def _versions_card(runs: Sequence[Run]) -> Card | None:
    told = dict.fromkeys(version for run in runs if (version := _version(run, "fillm")))
    torch = dict.fromkeys(version for run in runs if (version := _version(run, "torch")))
    return Card("Made by", f"fillm {', '.join(told)}", f"torch {', '.join(torch)}" if torch else "") if told else None


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count > 1 else ''}"


def _several(names: Sequence[str]) -> str:
    short = list(dict.fromkeys(_last_part(name) for name in names))
    return ", ".join(short[:3]) + (f" and {len(short) - 3:,} more" if len(short) > 3 else "")


def _last_part(path: str) -> str:
    """Of a path or a Hub id; `fillm.unlearn` calls all its models `model`, which is why their folder goes before."""
    parts = [part for part in path.split("/") if part]
    return "/".join(parts[-2 if parts[-1:] == ["model"] else -1 :]) or path


def _model(run: Run) -> str | None:
    told = run.settings.get("model") or run.settings.get("architecture")
    if told is None and run.command == "rank":
        return "the default model"
    return None if told is None else str(told)


def _setting(run: Run, name: str) -> str | None:
    value = run.settings.get(name)
    return None if value is None else str(value)


def _version(run: Run, package: str) -> str | None:
    value = _mapping(run.record.get("versions")).get(package)
    return None if value is None else str(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _typed(name: str, values: list[Any]) -> list[Any]:
    if name in ("seed", "seconds"):
        return [value if isinstance(value, int | float) else None for value in values]
    return [None if value is None else str(value) for value in values]
