"""The settings of `python -m fillm.report`: the one source of its flags, its YAML file and its Python arguments."""

from dataclasses import dataclass
from typing import Literal

from fillm.config import arguments, option
from fillm.errors import UsageError

FORMATS = ("html", "png", "svg", "tensorboard")


@dataclass(frozen=True)
class ReportConfig:
    """Show what runs came to: one page to work with, and a picture for everything that the runs can show."""

    runs: tuple[str, ...] = arguments("run folders of any command, and result files of benchmarks", "RUN")
    out: str = option("runs/report", "folder to write", "DIR")
    format: str = option("html,png,svg", f"comma-separated, of {', '.join(FORMATS)}", "FORMATS")
    title: str | None = option(None, "title of the report (default: the names of the runs)", "TEXT")
    theme: Literal["auto", "light", "dark"] = option(
        "auto",
        "background; auto: light pictures, which are also the ones to print, and pages as their reader's system is",
    )
    overwrite: bool = option(False, "replace an existing --out")
    debug: bool = option(False, "show a traceback with every error")

    @property
    def formats(self) -> list[str]:
        """The formats, each once, in the order given."""
        return list(dict.fromkeys(word.strip() for word in self.format.split(",") if word.strip()))


def check(config: ReportConfig) -> None:
    """Refuses what cannot be drawn.

    Raises:
        UsageError: naming the option.
    """
    unknown = [name for name in config.formats if name not in FORMATS]
    if unknown or not config.formats:
        raise UsageError(f"--format {config.format}: give some of {', '.join(FORMATS)}, separated by commas")
    if not config.runs:
        raise UsageError("give at least one RUN: a run folder, or a result file of a benchmark")
