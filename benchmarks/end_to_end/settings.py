"""The settings of `python -m benchmarks.end_to_end.bench_rank`."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fillm.config import flag_name, option
from fillm.errors import UsageError

PROGRAM = "python -m benchmarks.end_to_end.bench_rank"


@dataclass(frozen=True)
class BenchConfig:
    """Times, weighs and checks the ranking beside plain forward + backward and the published pipeline, on the CPU."""

    model: str | None = option(None, "folder of a causal LM; without it, one trained on the rows, made once", "DIR")
    tokenizer: str | None = option(None, "folder, if not the model's", "DIR")
    forget: str | None = option(None, "data spec of the rows to forget (default: fictional authors, or TOFU)", "SPEC")
    retain: str | None = option(None, "data spec of the rows to keep (default: as --forget)", "SPEC")
    data_root: str | None = option(None, "folder that holds tofu/ (or set FILLM_DATA)", "DIR")
    samples_per_set: int | None = option(None, "use this many samples of each set at most, for a trial run", "N")
    published_forget: int = option(10, "forget samples of the published pipeline, which keeps every gradient", "N")
    published_retain: int = option(30, "retain samples of the published pipeline", "N")
    sketch_dim: int = option(4096, "numbers that the published pipeline compresses a tensor's gradient to", "K")
    shuffle_rounds: int = option(20, "shuffles of the published compression", "N")
    damping: float = option(0.1, "factor in equation (1)", "X")
    tolerance: float = option(1e-3, "widest relative bracket of a certified score", "X")
    repeats: int = option(5, "rounds; every round runs everything once, after a round of warm-up", "N")
    threads: int | None = option(None, "torch threads (default: torch's own choice)", "N")
    accuracy: bool = option(True, "compare every score with float64 batch-1 autograd")
    memory: bool = option(True, "measure peak memory, each thing in a process of its own")
    out: str = option("benchmarks/results/rank_cpu.csv", "CSV file to write", "FILE")
    debug: bool = option(False, "show a traceback with every error")


def check(config: BenchConfig) -> None:
    """Refuses numbers below 1 (below or at 0 for `damping` and `tolerance`).

    Raises:
        UsageError: naming the option.
    """
    for name in ("published_forget", "published_retain", "sketch_dim", "repeats", "samples_per_set", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag_name(name)} {value}: give at least 1")
    if config.shuffle_rounds < 0:
        raise UsageError(f"--shuffle-rounds {config.shuffle_rounds}: give at least 0")
    for name in ("damping", "tolerance"):
        if not getattr(config, name) > 0:
            raise UsageError(f"{flag_name(name)} {getattr(config, name)}: has to be above 0")


def command_line(config: Any, program: str = PROGRAM) -> str:
    """The command that makes the same run; of absolute paths the last part only, as they hold on one machine.

    Args:
        config: the settings, a dataclass of `option`s.
        program: what is run.
    """
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name == "debug":
            continue
        if isinstance(value, bool):
            words.append(flag_name(field.name) if value else "--no-" + field.name.replace("_", "-"))
        else:
            words += [flag_name(field.name), shown(value)]
    return " ".join([program, shlex.join(words)]).rstrip()


def shown(value: object) -> str:
    """A setting as text, an absolute path without its folders."""
    text = str(value)
    return f".../{Path(text).name}" if text.startswith(("/", "~")) else text
