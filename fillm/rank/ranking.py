"""A finished ranking: its table, its updates, and the run folder that holds both."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from fillm.errors import NumericsError, RunFolderError, UsageError
from fillm.masks import LAYOUT_SCHEMA, Mask, make_choice
from fillm.paths import expanded
from fillm.rank.ranking_files import LazyTensors, check_files, read_record, read_table, write_files
from fillm.rank.selecting import mask_of, masks_of_samples
from fillm.runs import RunFolder

_INDEXED = ("row", "head")  # granularities at which one tensor has several rows
_STRINGS, _INTEGERS = ("name", "kind", "note"), ("rank", "index", "layer", "numel")
_NUMBERS = (
    "score", "score_low", "score_high", "damping", "mean_retain_sq_norm", "forget_norm", "predicted_forget_gain",
    "retain_damage",
)  # fmt: skip
_SAMPLES = {"id": pa.string(), "set": pa.string(), "tokens": pa.int64(), "loss": pa.float64()}


class Ranking:
    """Tensors, rows or heads of a model in the order of their scores.

    Attributes:
        table: one row per ranked unit, best first, columns as in `schema`.
        method: `soir`, `wagle`, ...
        objective: `forget`, `retain` or `trade-off`.
        granularity: `tensor`, `row`, `head` or `element` (one row per tensor).
        updates: `u` by tensor name, [*shape of the tensor], where it was computed, else None; of a loaded ranking it is
            read, and checked, when first asked for.
        samples: `id`, `set` (forget or retain), `tokens`, `loss` per sample, or None.
        per_sample: with `soir-per-sample`, a ranking for every forget sample: `sample`, `rank`, `name`, `score`,
            `score_low`, `score_high`, `note`; else None.
        tensors: how the units lie in their tensors, as `fillm.masks.layout_table` has it; None of rankings that were
            made without a model, or by a fillm that did not keep it: no mask can be selected from these.
        settings: every setting of the run.
        record: what else is known of the run: versions, fingerprints, seconds.
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        method: str,
        objective: str,
        granularity: str,
        updates: Mapping[str, Tensor] | None = None,
        samples: pa.Table | None = None,
        per_sample: pa.Table | None = None,
        tensors: pa.Table | None = None,
        settings: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.table, self.updates, self.samples, self.per_sample = table, updates, samples, per_sample
        self.tensors = tensors
        self.method, self.objective, self.granularity = method, objective, granularity
        self.settings, self.record = dict(settings or {}), dict(record or {})

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        *,
        ascending: bool = False,
        granularity: str,
        method: str,
        objective: str,
        updates: Mapping[str, Tensor] | None = None,
        samples: pa.Table | None = None,
        per_sample: pa.Table | None = None,
        tensors: pa.Table | None = None,
        settings: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> "Ranking":
        """Sorts scored units and numbers them from 1.

        The order: units whose note says `unused` last under every method and objective (method.md section 2); before
        that by `tier`, if rows have one; then by score; ties by name, then index.

        Args:
            rows: `name`, `kind`, `layer`, `numel`, `score` and, at row and head granularity, `index`; `score_low` and
                `score_high` default to the score, `note` to "", other columns of `schema` to null, `tier` to 0.
            ascending: smallest score first.
            granularity: as the attribute; so are the others.
            method: localisation method.
            objective: what the score stands for.
            updates: by tensor name.
            samples: `id`, `set`, `tokens`, `loss`.
            per_sample: as the attribute.
            tensors: as the attribute.
            settings: plain values, for YAML.
            record: plain values, for YAML.

        Raises:
            NumericsError: if a score is NaN.
            UsageError: if a row lacks a field or has an unknown one.
        """
        names = schema(granularity).names
        complete = [_complete(row, names) for row in rows]
        sign = 1.0 if ascending else -1.0
        complete.sort(
            key=lambda row: (
                "unused" in row["note"],
                row["tier"],
                sign * row["score"],
                row["name"],
                row.get("index", 0),
            )
        )
        columns = {name: [row.get(name) for row in complete] for name in names if name != "rank"}
        columns["rank"] = list(range(1, len(complete) + 1))
        return cls(
            pa.table([pa.array(columns[field.name], field.type) for field in schema(granularity)], schema(granularity)),
            method=method,
            objective=objective,
            granularity=granularity,
            updates=updates,
            samples=None if samples is None else _checked_samples(samples),
            per_sample=per_sample,
            tensors=tensors,
            settings=settings,
            record=record,
        )

    @property
    def names(self) -> list[str]:
        """Tensor names in the order of the ranking; at row and head granularity a tensor recurs."""
        return self.table["name"].to_pylist()

    @property
    def model_fingerprint(self) -> str | None:
        """Of the model that was ranked, None if that was not recorded."""
        return self.record.get("fingerprints", {}).get("model")

    @property
    def scores(self) -> dict[Any, float]:
        """Score by tensor name, in the order of the ranking; by (name, index) at row and head granularity."""
        keys: Sequence[Any] = self.names
        if self.granularity in _INDEXED:
            keys = list(zip(keys, self.table["index"].to_pylist(), strict=True))
        return dict(zip(keys, self.table["score"].to_pylist(), strict=True))

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.table.to_pylist()

    def __repr__(self) -> str:
        head = f"Ranking(method={self.method!r}, objective={self.objective!r}, granularity={self.granularity!r}, "
        lines = [head + f"{len(self)} entries)"]
        for row in self.table.slice(0, 5).to_pylist():
            unit = row["name"] + (f"[{row['index']}]" if "index" in row else "")
            lines.append(f"  {row['rank']}  {unit}  {row['score']:.5g}")
        return "\n".join(lines + (["  ..."] if len(self) > 5 else []))

    def select(
        self,
        fraction: float | None = None,
        side: str | None = None,
        of: str = "parameters",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        proportional: bool = False,
        band: tuple[float, float] | None = None,
        above: float | None = None,
    ) -> Mask:
        """The mask of a part of the ranking (docs/masks.md): by `fraction`, `band` or `above`.

        Units are taken in the order of the ranking, rank 1 first, while they fit; one at least. Fractions are of what
        `include` and `exclude` leave.

        Args:
            fraction: how much to take, 0.1 if nothing else is said.
            side: `top` (if not said) or `bottom`, which takes the last rank first. Units noted as unused are taken by
                `bottom` alone; so are single weights of score 0 or, where the smallest come first, infinity (of `path`:
                those that the step does not move).
            of: `parameters`, or `tensors` for a ranking of whole tensors.
            include: kinds and globs on names, listed or separated by commas.
            exclude: the same.
            proportional: the same fraction of every kind (`mlp`, `attn`, ...), each ordered by itself.
            band: from this fraction of the order to that one.
            above: what stands above this score: larger ones, or smaller ones where the smallest come first.

        Raises:
            UsageError: for a choice that cannot be or takes nothing.
        """
        return mask_of(self, make_choice(fraction, side, of, include, exclude, proportional, band, above))

    def select_per_sample(self, *arguments: Any, **choice: Any) -> dict[str, Mask]:
        """A mask for every forget sample, by its id, from the rankings of `soir-per-sample`; arguments as `select`.

        Raises:
            UsageError: as `select`, and if no single samples were ranked.
        """
        return masks_of_samples(self, make_choice(*arguments, **choice))

    def save(self, dir: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Writes a run folder, which appears whole or not at all.

        `ranking.parquet`, `ranking.csv`, `samples.parquet` and `update.safetensors` have the same bytes for the same
        content.

        Args:
            dir: the folder; must not exist, be empty, or be a run folder that `overwrite` allows to be replaced.
            overwrite: replace it.

        Returns:
            The folder.

        Raises:
            RunFolderError: if the folder is taken or the disk refuses.
        """
        with RunFolder(dir, overwrite=overwrite, resume=False) as folder:
            folder.finish(lambda path: write_files(self, path))
        return expanded(dir)

    @classmethod
    def load(cls, dir: str | os.PathLike[str]) -> "Ranking":
        """Reads a run folder; the updates stay on the disk until they are asked for.

        Raises:
            RunFolderError: saying which file is missing, damaged or not of a ranking, and how.
        """
        folder = expanded(dir)
        record = read_record(folder)
        files, described = record.pop("files"), record.pop("ranking")
        check_files(folder, files)
        table = read_table(folder / "ranking.parquet")
        try:
            granularity = described["granularity"]
            if not table.schema.equals(schema(granularity)):
                raise RunFolderError(f"{folder / 'ranking.parquet'}: its columns are not those of a ranking")
            return cls(
                table,
                method=described["method"],
                objective=described["objective"],
                granularity=granularity,
                updates=LazyTensors(folder, files) if "update.safetensors" in files else None,
                samples=read_table(folder / "samples.parquet") if "samples.parquet" in files else None,
                per_sample=read_table(folder / "per_sample.parquet") if "per_sample.parquet" in files else None,
                tensors=_read_tensors(folder) if "tensors.parquet" in files else None,
                settings=record.pop("settings"),
                record=record,
            )
        except KeyError as error:
            raise RunFolderError(f"{folder / 'run.yaml'}: says nothing of {error}; rank again") from None


def _read_tensors(folder: Path) -> pa.Table:
    table = read_table(folder / "tensors.parquet")
    if not table.schema.equals(LAYOUT_SCHEMA):
        raise RunFolderError(f"{folder / 'tensors.parquet'}: its columns are not those of a ranking")
    return table


def schema(granularity: str) -> pa.Schema:
    """The columns of `ranking.parquet`: rank, name, [index], kind, layer, numel, score, its bounds, and what led to it.

    `score` and its bounds are in the unit of the method; `damping` is `lambda` of method.md (1), `mean_retain_sq_norm`
    is `mean q_i`, `forget_norm` is `|v|`, `predicted_forget_gain` is `-v . u` in nat, `retain_damage` is that of (8);
    with `path` these two are gain and damage of (14); null where not computed.
    """
    names = ["rank", "name", "index", "kind", "layer", "numel", *_NUMBERS, "note"]
    if granularity not in _INDEXED:
        names.remove("index")
    never_null = {"rank", "score", *_STRINGS, *_INTEGERS}
    return pa.schema([pa.field(name, _type(name), nullable=name not in never_null) for name in names])


def _type(name: str) -> pa.DataType:
    return pa.string() if name in _STRINGS else pa.int64() if name in _INTEGERS else pa.float64()


def _complete(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    unknown = sorted(set(row) - set(names) - {"tier"})
    missing = [
        name for name in names if name in ("name", "index", "kind", "layer", "numel", "score") and name not in row
    ]
    if unknown or missing:
        what = f"has the unknown field {unknown[0]!r}" if unknown else f"lacks the field {missing[0]!r}"
        raise UsageError(f"ranking row {row.get('name', '?')}: {what}")
    score = float(row["score"])
    if math.isnan(score):
        raise NumericsError(f"the score of {row['name']} is NaN; a gradient or a weight of it is not finite")
    filled = {"tier": 0, "note": "", "score_low": score, "score_high": score}
    filled |= {name: value for name, value in row.items() if value is not None}
    return filled | {"score": score}


def _checked_samples(samples: pa.Table) -> pa.Table:
    if samples.column_names != list(_SAMPLES):
        raise UsageError(
            f"the sample table needs the columns {', '.join(_SAMPLES)}, not {', '.join(samples.column_names)}"
        )
    return samples.cast(pa.schema(list(_SAMPLES.items())))
