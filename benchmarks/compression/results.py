"""The rows of the study: parts by workload until all are there, a Parquet file with all, a CSV with what is quoted."""

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import fillm_kernels
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from benchmarks.compression.measures import Row
from benchmarks.compression.settings import PROGRAM, CompressionConfig
from benchmarks.end_to_end.results import commit, processor
from benchmarks.end_to_end.settings import command_line
from fillm.errors import UsageError

TEXT = ("workload", "model", "forget", "retain", "method", "kind", "storage")
COUNTS = (
    "model_parameters", "model_tensors", "forget_samples", "retain_samples", "n", "k", "sketched_tensors",
    "store_bytes", "pairs_out_of_order", "timed_samples", "rounds",
)  # fmt: skip
NUMBERS = (
    "spearman", "kendall", "top_overlap", "largest_error", "median_error", "median_signed_error",
    "coverage", "median_bar", "bar_over_error", "sketched_largest_error", "sketched_median_error",
    "d_error_median", "d_error_99", "d_within", "S_error_median", "S_error_largest",
    "K_error_median", "K_error_largest", "pass_seconds", "pass_over_plain",
    "seconds_per_sample", "seconds_per_sample_min", "seconds_per_sample_max",
    "over_plain", "over_plain_min", "over_plain_max",
)  # fmt: skip
SCHEMA = pa.schema(
    [(name, pa.string()) for name in TEXT]
    + [(name, pa.int64()) for name in COUNTS]
    + [(name, pa.float64()) for name in NUMBERS]
)
QUOTED_SIZES = (0, 256, 4096, 65536, None)  # of the CSV; None is exact
SETTINGS = b"settings"


def provenance(config: CompressionConfig) -> dict[str, str]:
    """Where, when and how: kept in the Parquet file's metadata and in the CSV's last columns."""
    return {
        "cpu": processor(),
        "threads": str(torch.get_num_threads()),
        "backends": " ".join(f"{op}:{found['used']['cpu']}" for op, found in fillm_kernels.backends().items()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(config, PROGRAM),
    }


def make_folder(path: Path) -> None:
    """Before anything is measured: a folder that cannot be written is known at once.

    Raises:
        UsageError: if it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written: {error.strerror or error}") from None


def write_part(path: Path, rows: Sequence[Row], settings: Mapping[str, Any], made: Mapping[str, str]) -> None:
    """What a workload came to so far, with the settings that it was measured with."""
    _write_table(path, _table(rows, settings, made))


def read_rows(path: Path, settings: Mapping[str, Any]) -> list[Row]:
    """The rows of a part or of all; none if there is no such file, or it was measured with other settings."""
    if not path.is_file():
        return []
    table = pq.read_table(path)
    same = (table.schema.metadata or {}).get(SETTINGS) == json.dumps(settings).encode()
    return table.to_pylist() if same and table.schema.equals(SCHEMA) else []


def write_all(out: Path, rows: Sequence[Row], settings: Mapping[str, Any], made: Mapping[str, str]) -> None:
    """`compression.parquet` with every row, `compression.csv` with all retain samples and some sizes."""
    _write_table(out / "compression.parquet", _table(rows, settings, made))
    text = StringIO()
    columns = [*SCHEMA.names, *made]
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        quoted = row.get("method") == "timing" or (
            row["n"] == row["retain_samples"] and row.get("k") in QUOTED_SIZES and row["storage"] == "float32"
        )
        if quoted:
            writer.writerow({name: _cell(value) for name, value in {**row, **made}.items() if value is not None})
    _replace(out / "compression.csv", text.getvalue().encode())


def drop_parts(folder: Path) -> None:
    """All parts, once they are in the Parquet file."""
    shutil.rmtree(folder, ignore_errors=True)


def _table(rows: Sequence[Row], settings: Mapping[str, Any], made: Mapping[str, str]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata({SETTINGS: json.dumps(settings), **made}))


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    _replace(path, sink.getvalue().to_pybytes())


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written: {error.strerror or error}") from None


def _cell(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
