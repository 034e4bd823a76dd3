"""The log of a training: one row an optimiser step, in memory a list of numbers, on disk `log.parquet`."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LOG_COLUMNS = ("step", "epoch", "samples", "tokens", "loss", "lr", "gradient_norm", "eval_loss", "seconds")
_COUNTS = ("step", "epoch", "samples", "tokens")


def write_log(log: Sequence[Sequence[float]], folder: Path, names: Sequence[str] = LOG_COLUMNS) -> None:
    """`log.parquet`: one row a step, columns `names`; counts int64, the rest float64, null for NaN.

    Raises:
        OSError: if the disk refuses.
    """
    columns = list(zip(*log, strict=True)) or [()] * len(names)
    arrays = [
        pa.array([int(value) for value in column], type=pa.int64())
        if name in _COUNTS
        else pa.array(column, type=pa.float64(), from_pandas=True)
        for name, column in zip(names, columns, strict=True)
    ]
    pq.write_table(pa.table(arrays, names=list(names)), folder / "log.parquet")
