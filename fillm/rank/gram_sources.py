"""Where inner products come from: sketches of both sets, a store of them, or exact Gram matrices."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fillm.capture import SketchMap
from fillm.data import SampleSet
from fillm.errors import StoreError, UsageError
from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.dealt_store import DealtSketches
from fillm.rank.gram_passes import exact_grams
from fillm.rank.machine import free_memory
from fillm.rank.scoring import Job
from fillm.rank.sketching import parse_size
from fillm.statistics import (
    DTYPES,
    DenseGram,
    GradientSketches,
    InnerProducts,
    MeanGradient,
    SketchStore,
    StoredSketches,
    StoreSettings,
    TensorGram,
    Together,
    holds_store,
    refuse_foreign,
    refuse_read_only,
    sketched_products,
    squared_norm,
)


@dataclass(frozen=True)
class TensorProducts:
    """One tensor's inner products, and the mean of `|v|` over its entries where v is at hand."""

    info: TensorInfo
    products: InnerProducts
    mean_absolute: float = 0.0


class RetainSketches(Protocol):
    """Sketches of the retain set, in memory or in a store; rows of all tensors in one order."""

    q: Mapping[str, Tensor]  # [n] exact |g_i|^2, float64

    def sketches(self, name: str) -> Tensor:
        """[n, k]."""
        ...


@dataclass
class Sketched:
    """Sketches of both sets, and the mean forget gradient where the method needs its exact length.

    Attributes:
        maps: what every tensor's gradients were sketched by.
    """

    maps: Mapping[str, SketchMap]
    retain: RetainSketches
    forget: GradientSketches
    v: Mapping[str, Tensor] | None


def needs_mean(method: str) -> bool:
    """Whether the right-hand side is the mean forget gradient, rather than every forget sample's."""
    return method in ("soir", "memflex")


def sketch_sets(job: Job) -> Sketched:
    """The passes over the forget and the retain set, or what of them a store spares."""
    config, maps = job.config, sketch_maps(job.config, job.scope)
    # What the store refuses is said before the first pass.
    store, positions = retain_left(config, maps, job.retain, job.model_fingerprint)
    wants_mean = needs_mean(config.canonical_method) and config.damping_dimension == "parameter"
    mean = MeanGradient(job.capture.parameters, len(job.forget)) if wants_mean else None
    forget = GradientSketches(maps, len(job.forget))
    parts = {"sketches": forget} if mean is None else {"sketches": forget, "mean": mean}
    job.passes.run("forget", "forget pass", job.capture, job.forget, Together(parts))
    if store is not None and not len(positions):
        retain: RetainSketches = _read(job, store)
    elif config.store is not None:
        _fill(job, maps, positions)
        retain = _read(job, SketchStore.open(config.store))
    else:
        retain = GradientSketches(maps, len(job.retain), dtype=getattr(torch, config.sketch_dtype))
        job.passes.run("retain", "retain pass", job.capture, job.retain, retain)
    return Sketched(maps, retain, forget, None if mean is None else mean.mean)


def _fill(job: Job, maps: Mapping[str, SketchMap], positions: range) -> None:
    """The retain pass into the store, which the first of several processes holds and writes."""
    processes, settings = job.passes.processes, store_settings(job.config)
    made = (job.config.store, maps, job.retain, job.model_fingerprint, settings)
    with StoredSketches(*made) if processes.first else nullcontext() as writer:
        statistic = writer
        if processes.count > 1:
            statistic = DealtSketches(processes, maps, DTYPES[settings.dtype], len(job.retain), writer)
        job.passes.run("retain", "retain pass", job.capture, job.retain, statistic, positions=positions)


def sketch_maps(config: RankConfig, scope: Sequence[TensorInfo]) -> dict[str, SketchMap]:
    """By name, the maps of the tensors in scope."""
    return {
        info.name: SketchMap.of(config.compression, config.sketch_dim, info.name, info.shape, config.seed)
        for info in scope
    }


def retain_left(
    config: RankConfig, maps: Mapping[str, SketchMap], retain: SampleSet, model: str | None
) -> tuple[SketchStore | None, range]:
    """The store, if one has been begun, and the positions of the retain samples that a pass has to visit.

    Args:
        config: the settings, kind and size of sketches chosen.
        maps: of the tensors in scope.
        retain: the samples; none where those of the store are asked for.
        model: fingerprint of the weights; None where they are not at hand, and are taken for the store's.

    Raises:
        StoreError: if the store was made from something else, holds nothing to rank from, or is damaged.
        UsageError: if sketches are too small for what is asked.
    """
    if config.store is None or not holds_store(config.store):
        if config.store is not None:
            refuse_foreign(config.store)
            refuse_read_only(config.store)
        _check_room(config, maps, len(retain))
        return None, range(len(retain))
    store, settings = SketchStore.open(config.store), store_settings(config)
    model = store.manifest.model if model is None else model
    if len(retain):
        positions, rows = store.check(model, settings, retain, maps), len(retain)
    else:  # no retain set was given: what is stored is the retain set
        store.check_origin(model, settings, maps)
        positions, rows = range(0), store.rows
        if not rows:
            raise StoreError(f"{config.store}: holds no sample yet; give the --retain that it was begun with")
    if len(positions):
        refuse_read_only(config.store)
    _check_room(config, maps, rows)
    store.verify(maps)  # no pass is to end with rows that a damaged store cannot be ranked from
    return store, positions


def _check_room(config: RankConfig, maps: Mapping[str, SketchMap], retain: int) -> None:
    """The true inverse fits a number to every retain sample: fewer numbers than samples say nothing of the rest."""
    short = [to.dim for to in maps.values() if to.kind != "exact" and to.dim < retain]
    if config.curvature == "woodbury" and short:
        raise UsageError(
            f"--curvature woodbury: sketches of {short[0]} numbers cannot tell {retain} retain samples apart; give "
            f"--sketch-dim {retain} or more (8 times as much for small errors), or --num-retain {short[0]} or less"
        )


def store_settings(config: RankConfig) -> StoreSettings:
    """What all sketches of a store share."""
    return StoreSettings(
        kind=config.compression,
        sketch_dim=config.sketch_dim,
        seed=config.seed,
        dtype=config.sketch_dtype,
        loss_reduction=config.loss_reduction,
    )


def _read(job: Job, store: SketchStore) -> SketchStore:
    path, job.stored = job.config.store, store
    if not len(job.retain) and not store.complete:
        job.passes.console.warn(f"{path} is not finished: ranking from the {store.rows} samples that it holds")
    if len(job.retain) and "retain" not in job.passes.losses:
        job.passes.console.note(f"{path} holds all {store.rows} retain samples: no retain pass")
    losses = torch.zeros(store.manifest.samples, dtype=torch.float64)
    losses[store.positions] = store.losses
    job.passes.losses["retain"] = losses
    job.capture.fallback |= {name: why for name, why in store.fallback.items() if name in job.capture.parameters}
    return store


def sketched_products_of(job: Job) -> Iterator[TensorProducts]:
    """Inner products of every tensor in scope, from sketches."""
    yield from products_of_sketches(sketch_sets(job), job.scope)


def products_of_sketches(sets: Sketched, scope: Iterable[TensorInfo]) -> Iterator[TensorProducts]:
    """What sketches of both sets say: of the mean forget gradient where it is at hand, else of every forget sample."""
    for info in scope:
        name, targets, squares, size = info.name, sets.forget.sketches(info.name), sets.forget.q[info.name], 0.0
        if sets.v is not None:
            targets = targets.double().mean(0)[None]
            squares = torch.tensor([squared_norm(sets.v[name])], dtype=torch.float64)
            size = float(sets.v[name].abs().mean(dtype=torch.float64))
        rows, q = sets.retain.sketches(name), sets.retain.q[name]
        yield TensorProducts(info, sketched_products(sets.maps[name], rows, q, targets, squares, info.numel), size)


def memory_budget(config: RankConfig) -> int:
    """Bytes for the gradients that exact Gram matrices keep: `--memory`, or half of what is free."""
    return parse_size(config.memory) if config.memory else free_memory() // 2


def exact_products(job: Job) -> Iterator[TensorProducts]:
    """Inner products of every tensor in scope, from Gram matrices in the gradients' own precision."""
    config = job.config
    mean = needs_mean(config.canonical_method)
    infos = {info.name: info for info in job.scope}
    for gram in exact_grams(job.passes, job.capture, job.forget, job.retain, memory_budget(config)):
        yield TensorProducts(infos[gram.name], products_of_gram(gram, mean))


def products_of_gram(gram: TensorGram, mean: bool) -> InnerProducts:
    """What exact Gram matrices say of the mean forget gradient, or of every forget sample."""
    cross = gram.cross.mean(1, keepdim=True) if mean else gram.cross
    squares = gram.forget.mean()[None] if mean else gram.forget.diagonal().clone()
    primal = None
    if gram.retain_rows is not None:
        right = gram.forget_rows.double().T
        primal = gram.retain_rows.double(), right.mean(1, keepdim=True) if mean else right
    q, nothing = gram.retain.diagonal().clone(), torch.zeros_like(squares)
    return InnerProducts(gram.numel, q, cross, squares, DenseGram(gram.retain), nothing, primal)
