"""Masks from a ranking: the units that a choice takes, and what they are of the model's tensors."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import fillm
from fillm.errors import UsageError
from fillm.masks import (
    PIECE,
    Choice,
    Mask,
    ScoredTensor,
    TensorLayout,
    TensorMask,
    chosen_units,
    element_masks,
    read_layouts,
)
from fillm.models import TensorInfo, select_tensors
from fillm.rank.config import SIGNED_SCORES
from fillm.rank.ranking_files import pieces_of, table_bytes

if TYPE_CHECKING:
    from fillm.rank.ranking import Ranking


def mask_of(ranking: "Ranking", choice: Choice) -> Mask:
    """The mask of what a choice takes of a ranking.

    Raises:
        UsageError: if it takes nothing, or if the ranking does not have what it needs.
    """
    layouts = _layouts(ranking, choice)
    table = _in_scope(ranking.table, layouts, choice)
    if ranking.granularity == "element":
        scores = _UpdateScores(ranking)
        kinds = dict(zip(table["name"].to_pylist(), table["kind"].to_pylist(), strict=True))
        scored = [ScoredTensor(name, kinds[name], layouts[name].shape) for name in sorted(kinds)]
        tensors = element_masks(choice, scored, scores)
    else:
        tensors = _unit_masks(table, layouts, choice, ascending=ranking.objective != "forget")
    return Mask(tensors, _provenance(ranking, choice), ranking.model_fingerprint)


def masks_of_samples(ranking: "Ranking", choice: Choice) -> dict[str, Mask]:
    """The mask of what a choice takes of the ranking of every forget sample, by the sample's id.

    Raises:
        UsageError: if there are no such rankings, or a choice takes nothing.
    """
    if ranking.per_sample is None:
        raise UsageError(
            f"select_per_sample: --method {ranking.method} ranks no single samples; rank with soir-per-sample"
        )
    layouts = _layouts(ranking, choice)
    known = {row["name"]: row for row in ranking.table.select(["name", "kind", "numel"]).to_pylist()}
    names = ranking.per_sample["name"].to_pylist()
    columns = {field: [known[name][field] for name in names] for field in ("kind", "numel")}
    whole = ranking.per_sample.append_column("kind", [columns["kind"]]).append_column("numel", [columns["numel"]])
    whole = _in_scope(whole, layouts, choice)
    samples, masks, provenance = np.array(whole["sample"].to_pylist(), dtype=object), {}, _provenance(ranking, choice)
    for sample in dict.fromkeys(samples.tolist()):
        table = whole.filter(pa.array(samples == sample)).sort_by("rank")
        tensors = _unit_masks(table, layouts, choice, ascending=False)
        masks[sample] = Mask(tensors, provenance | {"sample": sample}, ranking.model_fingerprint)
    return masks


def _layouts(ranking: "Ranking", choice: Choice) -> dict[str, TensorLayout]:
    if ranking.tensors is None:
        raise UsageError(
            "select: the ranking does not say how its tensors are laid out (an earlier fillm made it); rank again"
        )
    if choice.of == "tensors" and ranking.granularity != "tensor":
        raise UsageError(
            f"select: a part of the tensors cannot be taken of a ranking of {ranking.granularity}s; use of='parameters'"
        )
    return read_layouts(ranking.tensors)


def _in_scope(table: pa.Table, layouts: dict[str, TensorLayout], choice: Choice) -> pa.Table:
    """The rows of the tensors that the patterns of a choice leave."""
    names = table["name"].to_pylist()
    kinds = dict(zip(names, table["kind"].to_pylist(), strict=True))
    infos = [
        TensorInfo(name, kind, -1, torch.Size(shape).numel(), shape, (), 0, kind == "lora", name.rpartition(".")[0])
        for name, kind in kinds.items()
        for shape in [layouts[name].shape]
    ]
    kept = {info.name for info in select_tensors(infos, choice.include, choice.exclude)}
    return table.filter(pa.array([name in kept for name in names]))


def _unit_masks(
    table: pa.Table, layouts: dict[str, TensorLayout], choice: Choice, ascending: bool
) -> dict[str, TensorMask]:
    """The masks of the chosen rows of a table, whose order is that of the ranking."""
    unused = np.array(["unused" in note for note in table["note"].to_pylist()], dtype=bool)
    sizes, scores = table["numel"].to_numpy(), table["score"].to_numpy()
    chosen = table.filter(pa.array(chosen_units(choice, sizes, unused, scores, table["kind"].to_pylist(), ascending)))
    names = chosen["name"].to_pylist()
    if "index" not in table.column_names:
        return {name: TensorMask(layouts[name].shape) for name in names}
    units: dict[str, list[int]] = {}
    for name, index in zip(names, chosen["index"].to_pylist(), strict=True):
        units.setdefault(name, []).append(index)
    return {name: layouts[name].mask(_flags(layouts[name].units, taken)) for name, taken in units.items()}


def _flags(count: int, taken: Sequence[int]) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.tensor(taken), True)


class _UpdateScores:
    """The scores of single weights that a ranking keeps: `scores/NAME` where there is one, else the size of `NAME`."""

    def __init__(self, ranking: "Ranking") -> None:
        if ranking.updates is None:
            raise UsageError(
                "select: the ranking has no update.safetensors, where the scores of single weights are; rank again"
            )
        self._updates, self._saved = ranking.updates, set(ranking.updates)
        dtypes = {piece.dtype for name in set(ranking.names) for piece in islice(self._read(name, 1), 1)}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.ascending = ranking.objective != "forget"
        lowest = -float("inf") if ranking.method in SIGNED_SCORES else 0.0
        self.unused = float("inf") if self.ascending else lowest

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As `ElementScores` says."""
        return (piece.to(self.dtype) for piece in self._read(name, PIECE))

    def _read(self, name: str, entries: int) -> Iterator[Tensor]:
        if (key := f"scores/{name}") in self._saved:
            return pieces_of(self._updates, key, entries)
        return (piece.abs() for piece in pieces_of(self._updates, name, entries))


def _provenance(ranking: "Ranking", choice: Choice) -> dict[str, Any]:
    patterns = {"include": choice.include, "exclude": choice.exclude}
    return {
        "method": ranking.method,
        "objective": ranking.objective,
        "granularity": ranking.granularity,
        "select": choice.text,
        **{name: value if isinstance(value, str | None) else list(value) for name, value in patterns.items()},
        "ranking": hashlib.sha256(table_bytes(ranking.table)).hexdigest(),
        "fillm": fillm.__version__,
    }
