"""From run folders to a folder with a page and pictures."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fillm.config import from_mapping
from fillm.errors import UsageError
from fillm.report.config import ReportConfig, check
from fillm.report.drawing import draw
from fillm.report.figures import FigureData, figures_of
from fillm.report.runs import Run, load_runs
from fillm.report.tensorboard import write_events
from fillm.report.theme import THEMES
from fillm.runs import RunFolder, check_inputs_outside, run_record, write_record


def write_report(runs: Sequence[str], out: str, **settings: Any) -> list[FigureData]:
    """Draws what runs came to, as the command does.

    Args:
        runs: run folders and result files.
        out: the folder to write.
        settings: the other fields of `fillm.report.ReportConfig`.

    Returns:
        What was drawn.

    Raises:
        UsageError: settings that cannot be honoured, or runs that have nothing to draw.
        RunFolderError: a run that cannot be read, or an `out` that cannot be written.
    """
    # A single string is left for the settings to refuse.
    given = {"runs": runs if isinstance(runs, str) else [str(run) for run in runs], "out": str(out), **settings}
    return run(from_mapping(ReportConfig, given, where="write_report"), tell=lambda line: None)


def run(config: ReportConfig, tell: Any = None) -> list[FigureData]:
    """What `python -m fillm.report` does."""
    tell = tell or (lambda line: print(line, file=sys.stderr, flush=True))
    check(config)
    check_inputs_outside(config)
    runs = load_runs(config.runs, tell)
    figures = figures_of(runs)
    if not figures:
        raise UsageError(f"{', '.join(run.name for run in runs)}: nothing to draw of these runs alone; give more runs")
    with RunFolder(config.out, overwrite=config.overwrite, resume=False) as folder:
        folder.finish(lambda path: _write(path, config, runs, figures))
    tell(f"{len(figures)} figures of {len(runs)} runs: {', '.join(data.name for data in figures)}")
    tell(f"report: {Path(config.out)}")
    return figures


def _write(path: Path, config: ReportConfig, runs: Sequence[Run], figures: Sequence[FigureData]) -> None:
    theme = THEMES["light" if config.theme == "auto" else config.theme]
    if "html" in config.formats:
        from fillm.report.page import write_page

        write_page(path / "report.html", runs, figures, _title(config, runs), config.theme)
    for suffix in ("png", "svg"):
        if suffix in config.formats:
            for data in figures:
                draw(data, path / f"{data.name}.{suffix}", theme)
    if set(config.formats) & {"png", "svg"}:
        (path / "report.md").write_text(_page(config, runs, figures), encoding="utf-8")
    if "tensorboard" in config.formats:
        write_events(runs, figures, path / "tensorboard", theme)
    prints = {run.name: run.fingerprint() for run in runs}
    write_record(path, run_record(config, prints, [], torch.device("cpu")))


def _title(config: ReportConfig, runs: Sequence[Run]) -> str:
    return config.title or ", ".join(run.name for run in runs)


def _page(config: ReportConfig, runs: Sequence[Run], figures: Sequence[FigureData]) -> str:
    """The pictures with their captions, in Markdown."""
    suffix = "png" if "png" in config.formats else "svg"
    parts = [f"# {_text(_title(config, runs))}"]
    for data in figures:
        parts += [f"## {data.title}", f"![{data.title}]({data.name}.{suffix})", _text(data.caption)]
    lines = [f"| {_text(run.name)} | {run.command} | {_text(str(run.path))} |" for run in runs]
    return "\n\n".join([*parts, "## Runs", "\n".join(["| run | command | from |", "|---|---|---|", *lines])]) + "\n"


def _text(name: str) -> str:
    """In Markdown, one line of nothing but text: no tag, no cell of a table, no code."""
    return re.sub(r"([\\`*_|<>\[\]$&#])", r"\\\1", " ".join(name.split()))
