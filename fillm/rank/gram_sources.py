"""Where inner products come from: sketches of both sets, a store of them, or exact Gram matrices."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fillm.capture import SketchMap
from fillm.errors import UsageError
from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.gram_passes import exact_grams
from fillm.rank.machine import free_memory
from fillm.rank.scoring import Job
from fillm.rank.sketching import parse_size
from fillm.statistics import (
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
    config = job.config
    maps = {
        info.name: SketchMap.of(config.compression, config.sketch_dim, info.name, info.shape, config.seed)
        for info in job.scope
    }
    _check_room(config, maps, len(job.retain))
    wants_mean = needs_mean(config.canonical_method) and config.damping_dimension == "parameter"
    mean = MeanGradient(job.capture.parameters, len(job.forget)) if wants_mean else None
    forget = GradientSketches(maps, len(job.forget))
    parts = {"sketches": forget} if mean is None else {"sketches": forget, "mean": mean}
    job.passes.run("forget", "forget pass", job.capture, job.forget, Together(parts))
    if config.store is not None:
        retain: RetainSketches = stored_retain(job, maps)
    else:
        retain = GradientSketches(maps, len(job.retain), dtype=getattr(torch, config.sketch_dtype))
        job.passes.run("retain", "retain pass", job.capture, job.retain, retain)
    return Sketched(maps, retain, forget, None if mean is None else mean.mean)


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


def stored_retain(job: Job, maps: Mapping[str, SketchMap]) -> SketchStore:
    """The store of the settings, built, continued, added to, or read as it is where it holds all that is asked for."""
    config, path, settings = job.config, job.config.store, store_settings(job.config)
    if holds_store(path):
        store = SketchStore.open(path)
        if not len(job.retain):  # no retain set was given: what is stored is the retain set
            store.check_origin(job.model_fingerprint, settings, maps)
            if not store.complete:
                job.passes.console.warn(f"{path} is not finished: ranking from the {store.rows} samples that it holds")
            _check_room(config, maps, store.rows)
            return _read(job, store)
        if not len(store.check(job.model_fingerprint, settings, job.retain, maps)):
            job.passes.console.note(f"{path} holds all {store.rows} retain samples: no retain pass")
            return _read(job, store)
    with StoredSketches(path, maps, job.retain, job.model_fingerprint, settings) as writer:
        job.passes.run("retain", "retain pass", job.capture, job.retain, writer, positions=writer.positions)
    return _read(job, SketchStore.open(path))


def _read(job: Job, store: SketchStore) -> SketchStore:
    job.stored = store
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
