"""How far fine-tuning moves each matrix: `|theta - theta_0| / |theta_0|`, by layer and kind."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment.case import Case
from benchmarks.experiment.figure import dots, panels, save
from benchmarks.experiment.results import Record
from fillm.models import catalogue, load_model
from fillm.report.figures.intervals import Interval, interval

KEY = ("tensor",)
COLUMNS = ("tensor", "kind", "layer", "numel", "shift", "relative_shift")
DEFAULTS: Mapping[str, Any] = {}


def records(case: Case, settings: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Record]:
    """A record a matrix: root mean square of the change, and its length over that of what was there before."""
    there = {row["tensor"] for row in done}
    base = dict(load_model(str(case.base()), device="cpu").named_parameters())
    tensors = [info for info in catalogue(case.model) if info.name.endswith("weight") and len(info.shape) > 1]
    now = dict(case.model.named_parameters())
    for info in tensors:
        if info.name in there:
            continue
        before, after = base[info.name].detach().double(), now[info.name].detach().double().cpu()
        moved = float((after - before).norm())
        yield {
            "family": case.family, "seed": case.seed, "tensor": info.name, "kind": info.kind, "layer": info.layer,
            "numel": info.numel, "shift": moved / info.numel**0.5,
            "relative_shift": moved / float(before.norm()),
        }  # fmt: skip


def by_place(records: Sequence[Record], kind: str) -> dict[str, Interval]:
    """Layer -> the mean relative shift of a kind's matrices, over models."""
    layers = sorted({row["layer"] for row in records if row["kind"] == kind})
    return {f"layer {layer}" if layer >= 0 else "outside": interval(_means(records, kind, layer)) for layer in layers}


def _means(records: Sequence[Record], kind: str, layer: int) -> list[float]:
    of_models: dict[tuple[Any, Any], list[float]] = {}
    for row in records:
        if (row["kind"], row["layer"]) == (kind, layer):
            of_models.setdefault((row["family"], row["seed"]), []).append(row["relative_shift"])
    return [sum(shifts) / len(shifts) for shifts in of_models.values()]


def summary(records: Sequence[Record]) -> str:
    """A row a layer, a column a kind; of all models, then of every family by itself."""
    kinds = list(dict.fromkeys(row["kind"] for row in records))
    lines = ["relative shift, mean over models (95 % interval)", ""]
    lines += ["| | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    families = list(dict.fromkeys(row["family"] for row in records))
    for title, wanted in (("all", families), *((family, [family]) for family in families)):
        own = [row for row in records if row["family"] in wanted]
        of_kinds = {kind: by_place(own, kind) for kind in kinds}
        for place in sorted({place for found in of_kinds.values() for place in found}):
            cells = " | ".join(str(of_kinds[kind].get(place, "")) for kind in kinds)
            lines.append(f"| {title}, {place} | {cells} |")
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path) -> None:
    """A row a layer, a dot a kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in records))
    of_kinds = {kind: by_place(records, kind) for kind in kinds}
    places = sorted({place for found in of_kinds.values() for place in found})
    rows = {place: [(kind, of_kinds[kind][place]) for kind in kinds if place in of_kinds[kind]] for place in places}
    figure, [axes] = panels(["shift by fine-tuning"], 5.0, 1.2 + 0.35 * len(rows))
    dots(axes, rows, "length of the change over length before (ratio)")
    axes.invert_yaxis()
    save(figure, path)
