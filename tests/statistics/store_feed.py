"""What a pass hands a store, made to order: samples, gradients of four tensors, batches; and a store's bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fillm.capture.gradients import DenseGradients
from fillm.data import Sample, SampleSet
from fillm.statistics import StoredSketches, StoreSettings

MODEL = "5d" * 32
SETTINGS = StoreSettings(kind="oporp", sketch_dim=16, seed=3, dtype="float32", loss_reduction="mean")
ROUNDED = StoreSettings(kind="oporp", sketch_dim=16, seed=3, dtype="bfloat16", loss_reduction="mean")
SHAPES = {"weight": (9, 7), "norm": (6,), "unused": (5,), "late": (4, 8)}
REACHED = ("weight", "norm", "late")
BATCH = 2


@dataclass(frozen=True)
class Map:
    """The least that a map of one tensor has to say."""

    kind: str
    dim: int
    shape: tuple[int, ...]
    seed: int
    halves: int = 1

    @property
    def matrix(self) -> Tensor:
        """[numel, dim] float32, whole numbers up to 8."""
        numel = torch.Size(self.shape).numel()
        if self.kind == "exact":
            return torch.eye(numel)
        drawn = torch.randint(-8, 9, (numel, self.dim), generator=torch.Generator().manual_seed(self.seed))
        return drawn.float()


MAPS = {
    "weight": Map("oporp", 16, SHAPES["weight"], 11),
    "norm": Map("exact", 6, SHAPES["norm"], 12),
    "unused": Map("exact", 5, SHAPES["unused"], 13),
    "late": Map("oporp", 16, SHAPES["late"], 2**64 - 1),
}


class SketchedGradients(DenseGradients):
    """Dense gradients that a map's matrix sketches."""

    def sketches(self, to: Map) -> Tensor:
        """[B, dim]."""
        return self.values.flatten(1) @ to.matrix


def samples(count: int, first: int = 0) -> SampleSet:
    """Samples of one to four tokens, every one of its own."""
    rows = []
    for number in range(first, first + count):
        tokens = tuple(range(number, number + 1 + number % 4))
        rows.append(Sample(f"feed#{number}", tokens, (-100, *tokens[1:])))
    return SampleSet(rows, "feed")


def gradients(count: int) -> dict[str, Tensor]:
    """[count, *shape] float32 of every tensor that is reached; the same rows whatever `count`.

    Whole numbers up to 500, so that their products with a map's matrix add up exactly in float32, in any order.
    """
    rows = [torch.Generator().manual_seed(number) for number in range(count)]
    out = {}
    for name in REACHED:
        drawn = [torch.randint(-500, 501, SHAPES[name], generator=row) for row in rows]
        out[name] = torch.stack(drawn).float() if rows else torch.zeros(0, *SHAPES[name])
    return out


def loss(position: int) -> float:
    """A loss that decimal digits do not hold."""
    return 1.0 / (position + 3)


def expected_rows(name: str, positions: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a store must hold of a tensor, row by row as a batch of one would give it."""
    if name not in REACHED:
        return torch.zeros(len(positions), MAPS[name].dim, dtype=dtype)
    g = gradients(max(positions, default=-1) + 1)[name]
    return SketchedGradients(g[list(positions)]).sketches(MAPS[name]).to(dtype)


def plan(positions: Sequence[int], size: int = BATCH) -> list[list[int]]:
    """Batches from the last sample to the first."""
    backwards = list(positions)[::-1]
    return [backwards[start : start + size] for start in range(0, len(backwards), size)]


def feed(store: StoredSketches, batches: Sequence[Sequence[int]] | None = None, most: int | None = None) -> None:
    """Goes through a store's batches as a pass would, all of them or `most` of those that are left.

    The tensor `late` comes sample by sample, and before the others.
    """
    g = gradients(len(store.samples))
    batches = plan(store.positions) if batches is None else batches
    done, _, fallback = store.resume_point(batches)
    for batch in list(batches[done:])[:most]:
        for position in batch:
            store.observe("late", SketchedGradients(g["late"][[position]]), torch.tensor([position]))
        for name in ("norm", "weight"):
            store.observe(name, SketchedGradients(g[name][batch]), torch.tensor(batch))
        assert store.first_not_finite(batch) is None
        fallback = {**fallback, **({"late": "no rule for roll"} if 0 in batch or 5 in batch else {})}
        store.end_of_batch(batch, torch.tensor([loss(p) for p in batch], dtype=torch.float64), fallback)
    if most is None:
        store.close()


def build(path: Path, count: int, settings: StoreSettings = SETTINGS) -> None:
    """Makes, continues or adds to a store, until it holds `count` samples."""
    with StoredSketches(path, MAPS, samples(count), MODEL, settings) as store:
        feed(store)


def all_bytes(path: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
