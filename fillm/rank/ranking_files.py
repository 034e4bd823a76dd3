"""The files of a ranking's run folder. `run.yaml` comes last and holds the checksum of every other file."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fillm import runs
from fillm.errors import RunFolderError
from fillm.figures import score_heatmap
from fillm.runs import RUN_RECORD, write_record
from fillm.runs.state_files import check_file
from fillm.runs.tensor_files import read_streamed, save_streamed

if TYPE_CHECKING:
    from fillm.rank.ranking import Ranking

_REMEDY = "rank again, or copy the folder again from where it is whole"
_UNITS = {
    "soir": "score |u| (weight per nat)",
    "soir-sum": "score mean |u|",
    "soir-per-sample": "mean score |u| (weight per nat)",
    "first-order": "score sum |<f, g>|",
    "saliency": "score sum |v| (nat per weight)",
    "memflex": "score mean |v| (nat per weight)",
    "wagle": "score (nat)",
    "path": "score (nat)",
    "parameter-shift": "score |shift| (weight)",
}
_OBJECTIVE_UNITS = {"retain": "damage of the step u", "trade-off": "predicted retain change (nat)"}


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of `update.safetensors`, one read at a time; the file's checksum is compared before the first.

    Raises:
        RunFolderError: on first access, if the file is damaged.
        KeyError: for a tensor that is not in it.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        self._path, self._entry = folder / "update.safetensors", files["update.safetensors"]
        self._opened: Any = None

    def _file(self) -> Any:
        if self._opened is None:
            check_file(self._path, self._entry["sha256"], self._entry["bytes"], _REMEDY)
            try:
                self._opened = safe_open(str(self._path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise RunFolderError(f"{self._path}: {error}; {_REMEDY}") from None
        return self._opened

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._file().get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in set(self._file().keys())

    def pieces(self, name: str, entries: int) -> Iterator[Tensor]:
        """The entries of one tensor in flat order, `entries` at a time; no more is in memory."""
        if name not in self:
            raise KeyError(name)
        return read_streamed(self._path, name, entries)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file().keys()))

    def __len__(self) -> int:
        return len(self._file().keys())


def pieces_of(tensors: Mapping[str, Tensor], name: str, entries: int) -> Iterator[Tensor]:
    """The entries of one tensor in flat order, `entries` at a time, wherever it lies."""
    if isinstance(tensors, LazyTensors):
        return tensors.pieces(name, entries)
    return iter(tensors[name].detach().cpu().flatten().split(entries))


def write_files(ranking: "Ranking", folder: Path) -> None:
    """Writes everything that belongs to a ranking into an existing folder.

    Raises:
        OSError, SafetensorError: if the disk refuses.
    """
    write_table(ranking.table, folder / "ranking.parquet")
    (folder / "ranking.csv").write_text(to_csv(ranking.table), encoding="utf-8", newline="")
    if ranking.updates is not None:
        save_streamed(folder / "update.safetensors", ranking.updates)
    if ranking.samples is not None:
        write_table(ranking.samples, folder / "samples.parquet")
    if ranking.per_sample is not None:
        write_table(ranking.per_sample, folder / "per_sample.parquet")
    if ranking.tensors is not None:
        write_table(ranking.tensors, folder / "tensors.parquet")
    if len(ranking):
        _draw(ranking, folder / "heatmap.png")
    described = {
        "ranking": {
            "method": ranking.method,
            "objective": ranking.objective,
            "granularity": ranking.granularity,
            "entries": len(ranking),
        },
        "settings": ranking.settings,
        **ranking.record,
        "files": runs.checksums(folder.iterdir()),
    }
    write_record(folder, described)


def table_bytes(table: pa.Table) -> bytes:
    """What `write_table` would write."""
    file = io.BytesIO()
    write_table(table, file)
    return file.getvalue()


def write_table(table: pa.Table, path: Path | io.BytesIO) -> None:
    """Parquet with every option that reaches the bytes fixed, and a checksum on every page."""
    pq.write_table(
        table.replace_schema_metadata(None).combine_chunks(),
        path,
        compression="zstd",
        compression_level=3,
        use_dictionary=["kind", "note", "set", "sample"],
        row_group_size=1 << 20,
        write_statistics=True,
        write_page_checksum=True,
        version="2.6",
        data_page_version="1.0",
    )


def read_table(path: Path) -> pa.Table:
    """Parquet back, its page checksums compared.

    Raises:
        RunFolderError: if it is missing or damaged.
    """
    try:
        return pq.read_table(path, page_checksum_verification=True).replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(f"{path}: damaged or missing ({' '.join(str(error).split())}); {_REMEDY}") from None


def to_csv(table: pa.Table) -> str:
    """Comma-separated, a header, lines ended by a line feed; floats read back to the bit, null is nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for batch in table.to_batches(max_chunksize=1 << 16):
        writer.writerows(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    return text.getvalue()


def read_record(folder: Path) -> dict[str, Any]:
    """`run.yaml` of a ranking's folder.

    Raises:
        RunFolderError: if the folder is not there, not whole, not of a ranking, or the file damaged.
    """
    path = folder / RUN_RECORD
    if not path.is_file():
        if folder.with_name(folder.name + ".partial").is_dir():
            raise RunFolderError(f"{folder}: the run is not finished; continue it with --resume")
        if folder.is_file():
            raise RunFolderError(f"{folder}: is a file; give the run folder that it lies in")
        where = f"{path}: missing; not the folder of a finished run" if folder.is_dir() else f"{folder}: no such folder"
        raise RunFolderError(where)
    record = runs.read_record(path, _REMEDY)
    keys = ("ranking", "settings", "files")
    if not isinstance(record, dict) or not all(isinstance(record.get(key), dict) for key in keys):
        raise RunFolderError(f"{path}: not the record of a ranking; give the folder that fillm.rank wrote")
    return record


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a folder in which a file is missing or differs; of the large `update.safetensors` only the size is read.

    Raises:
        RunFolderError: naming the file.
    """
    for name in {"ranking.parquet", *files}:
        entry, path = files.get(name), folder / name
        if not isinstance(entry, Mapping) or not {"bytes", "sha256"} <= set(entry):
            raise RunFolderError(f"{folder / RUN_RECORD}: damaged (says nothing of {name}); {_REMEDY}")
        if name != "update.safetensors":
            check_file(path, entry["sha256"], entry["bytes"], _REMEDY)
        elif not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise RunFolderError(f"{path}: missing or damaged (its size is not {entry['bytes']} bytes); {_REMEDY}")


def score_label(method: str, objective: str) -> str:
    """What a score is, with its unit, for an axis."""
    return _OBJECTIVE_UNITS.get(objective) or _UNITS.get(method, "score")


def _draw(ranking: "Ranking", path: Path) -> None:
    columns = [ranking.table[name].to_pylist() for name in ("name", "kind", "layer", "score")]
    label = score_label(ranking.method, ranking.objective)
    each = f", largest {ranking.granularity} of each tensor" if ranking.granularity in ("row", "head") else ""
    score_heatmap(*columns, path, title=f"{ranking.method}, objective {ranking.objective}{each}", label=label)
