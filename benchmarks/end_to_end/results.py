"""Rows of a benchmark: the CSV with where and how they were made, and the table a person reads."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import fillm_kernels
import torch
import transformers

from benchmarks.end_to_end.settings import PROGRAM, command_line, shown
from benchmarks.end_to_end.workload import Workload
from fillm.errors import UsageError
from fillm.models import model_fingerprint

MEASURED = (
    "key", "what", "baseline", "forget_samples", "retain_samples", "tokens", "tokens_per_batch", "repeats",
    "seconds_per_sample", "seconds_per_sample_min", "seconds_per_sample_max",
    "over_plain", "over_plain_min", "over_plain_max",
    "over_certified", "over_certified_min", "over_certified_max",
    "tokens_per_second", "peak_bytes", "peak_bytes_min", "peak_bytes_max", "loaded_bytes", "peak_over_loaded_bytes",
    "largest_relative_error", "spearman", "outside_bounds", "note",
)  # fmt: skip
PROVENANCE = (
    "cpu", "cores", "threads", "backends", "torch", "transformers", "python", "commit", "date",
    "model", "model_parameters", "model_tensors", "model_fingerprint", "forget", "retain", "command",
)  # fmt: skip
Row = dict[str, Any]


def provenance(config: Any, work: Workload, program: str = PROGRAM) -> Row:
    """The machine, the versions, the inputs and the command of a run.

    Args:
        config: the settings, a dataclass of `option`s with `forget` and `retain` among them.
        work: what was measured on.
        program: what is run.
    """
    parameters = dict(work.model.named_parameters())
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": " ".join(f"{op}:{found['used']['cpu']}" for op, found in fillm_kernels.backends().items()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": type(work.model).__name__,
        "model_parameters": sum(p.numel() for p in parameters.values()),
        "model_tensors": len(parameters),
        "model_fingerprint": model_fingerprint(work.model)[:16],
        "forget": shown(config.forget),
        "retain": shown(config.retain),
        "command": command_line(config, program),
    }


def processor() -> str:
    """What the machine calls its CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def commit() -> str:
    """The commit of the checkout, `-dirty` if a tracked file differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def spread_of(name: str, values: Sequence[float]) -> Row:
    """Median, least and most under `name`, `name_min`, `name_max`."""
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def write_csv(path: Path, rows: Sequence[Row], made: Mapping[str, Any], measured: Sequence[str] = MEASURED) -> None:
    """One line a row, the provenance repeated in each; the file appears whole.

    Args:
        path: of the file.
        rows: what was measured.
        made: what `provenance` says.
        measured: columns of the rows.

    Raises:
        UsageError: if it cannot be written.
    """
    text = StringIO()
    writer = csv.DictWriter(text, [*measured, *PROVENANCE], restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in {**row, **made}.items()})
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text.getvalue(), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written: {error.strerror or error}") from None


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def table(rows: Sequence[Row]) -> str:
    """The rows for a person: medians, least to most in brackets; `-` where nothing was measured."""
    header = ["", "samples", "ms/sample", "over plain", "over certified", "tokens/s"]
    header += ["peak MiB", "over loaded", "worst error", "Spearman"]
    lines = [header]
    for row in rows:
        lines.append(
            [
                row["what"] + (" *" if row.get("baseline") else ""),
                f"{row['forget_samples']}+{row['retain_samples']}",
                _range(row, "seconds_per_sample", 1e3, 1),
                _range(row, "over_plain", 1.0, 2),
                _range(row, "over_certified", 1.0, 2),
                _number(row, "tokens_per_second", "{:.0f}"),
                _number(row, "peak_bytes", "{:.0f}", 2**-20),
                _number(row, "peak_over_loaded_bytes", "+{:.0f}", 2**-20),
                _number(row, "largest_relative_error", "{:.1e}"),
                _number(row, "spearman", "{:.4f}"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _number(row: Row, name: str, form: str, scale: float = 1.0) -> str:
    return form.format(row[name] * scale) if name in row else "-"


def _range(row: Row, name: str, scale: float, digits: int) -> str:
    if name not in row:
        return "-"
    middle, low, high = (f"{row[key] * scale:.{digits}f}" for key in (name, f"{name}_min", f"{name}_max"))
    return f"{middle} ({low}-{high})"
