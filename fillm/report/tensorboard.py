"""Runs and their figures as event files for TensorBoard, written by torch's own writer."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fillm.config import to_yaml
from fillm.errors import UsageError
from fillm.report.drawing import draw
from fillm.report.figures.data import FigureData
from fillm.report.runs import Run
from fillm.report.theme import Theme

_NO_SCALARS = ("step", "epoch", "samples")  # of a log: where a row stands, not what was measured


def write_events(runs: Sequence[Run], figures: Sequence[FigureData], folder: Path, theme: Theme) -> None:
    """One log folder a run (the columns of its log, its metrics, its scores, its record), and one with the figures.

    The bytes differ from time to time: the format holds the time and the machine.

    Args:
        runs: what to write.
        figures: drawn as images.
        folder: to be made.
        theme: of the images.

    Raises:
        UsageError: if the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--format tensorboard: needs the package tensorboard; pip install 'fillm[report-tensorboard]'"
        ) from None
    for run in runs:
        with SummaryWriter(str(folder / run.name.replace("/", "_"))) as writer:
            _write_run(run, writer)
    with SummaryWriter(str(folder / "report")) as writer:
        for data in figures:
            writer.add_image(data.name, _pixels(data, theme), dataformats="HWC")
            writer.add_text(data.name, data.caption)


def _write_run(run: Run, writer: Any) -> None:
    writer.add_text("run.yaml", f"```\n{to_yaml(run.record)}```")
    numbers = {k: v for k, v in run.summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for name, value in numbers.items():
        writer.add_scalar(f"{run.command}/{name}", value)
    if run.summary.get("notes"):
        writer.add_text("notes", json.dumps(run.summary["notes"], indent=1))
    if "log" in run.tables:
        log = run.tables["log"].to_pydict()
        for name, column in log.items():
            if name not in _NO_SCALARS:
                for step, value in zip(log["step"], column, strict=True):
                    if value is not None:
                        writer.add_scalar(f"log/{name}", value, step)
    if run.command == "rank":
        scores = np.array(run.tables["ranking"]["score"].to_pylist(), dtype=np.float64)
        scores = scores[np.isfinite(scores) & (scores > 0.0)]
        if len(scores):
            writer.add_histogram("log10 of the scores above 0", np.log10(scores))


def _pixels(data: FigureData, theme: Theme) -> np.ndarray:
    """[H, W, 3], uint8."""
    from matplotlib.image import imread

    file = BytesIO()
    draw(data, file, theme, kind="png")
    file.seek(0)
    return np.rint(imread(file)[:, :, :3] * 255.0).astype(np.uint8)
