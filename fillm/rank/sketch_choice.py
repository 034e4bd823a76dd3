"""Which sketch a run takes, where the settings leave it open: what a store was made with, or what fits the memory."""

import dataclasses
from collections.abc import Sequence

from fillm.errors import UsageError
from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.plan_lines import in_bytes
from fillm.rank.sketching import parse_size
from fillm.statistics import BAR, SketchStore, holds_store

AUTO_KIND = "countsketch"
AUTO_MEMORY = "8GiB"
LEAST_DIM, LARGEST_DIM = 64, 1 << 18
# Relative error bars that are small beside what tensors' scores differ by.
SMALL_BAR, SMALL_WOODBURY_BAR = 1e-4, 5e-3
FIRST_ORDER_DIM = 4096  # what noise does to absolute values falls with 1/k as well, but has no bound


def with_sketches_chosen(config: RankConfig) -> RankConfig:
    """The settings with kind, size and type of sketches filled in.

    Raises:
        StoreError: if the store cannot be read.
        UsageError: if there is neither a store nor a kind to build one with, or if a size is given that is not the
            store's, or beside `--compression auto`, which takes its own.
    """
    if config.compression not in ("none", "auto") or not config.sketched:
        return config
    if config.store is None or not holds_store(config.store):
        if config.compression == "auto":
            if config.sketch_dim != 4096:
                raise UsageError(
                    f"--sketch-dim {config.sketch_dim} has no effect: --compression auto chooses the size; leave it "
                    "out, or give a kind"
                )
            return config
        raise UsageError(f"--store {config.store}: there is no store yet; give --compression to build one")
    made = SketchStore.open(config.store).manifest.settings
    for option, given, default, found in (
        ("--sketch-dim", config.sketch_dim, 4096, made.sketch_dim),
        ("--sketch-dtype", config.sketch_dtype, "float32", made.dtype),
    ):
        if given not in (default, found):
            raise UsageError(f"{option} {given}: {config.store} was made with {found}; leave it out")
    # What `--memory` was to bound is settled, as by `chosen_for_memory`: a replay and `--resume` find the same.
    memory = None if config.compression == "auto" else config.memory
    return dataclasses.replace(
        config, compression=made.kind, sketch_dim=made.sketch_dim, sketch_dtype=made.dtype, memory=memory
    )


def chosen_for_memory(
    config: RankConfig, scope: Sequence[TensorInfo], samples: int, retain: int
) -> tuple[RankConfig, str]:
    """Settles `--compression auto`: the largest useful size that fits `--memory`, of the kind that tells most per byte.

    Args:
        config: the settings.
        scope: tensors to rank.
        samples: of both sets, whose sketches are held at once.
        retain: number of retain samples.

    Returns:
        The settings with kind and size, and a line that says why.

    Raises:
        UsageError: if not even the smallest sketches fit.
    """
    if config.compression != "auto":
        return config, ""
    asked = config.memory or AUTO_MEMORY
    budget, itemsize = parse_size(asked), 2 if config.sketch_dtype == "bfloat16" else 4
    wanted = _useful_dim(config, retain)
    dim = wanted
    while dim > LEAST_DIM and sketch_bytes(scope, dim, samples, itemsize) > budget:
        dim //= 2
    taken = sketch_bytes(scope, dim, samples, itemsize)
    if taken > budget:
        raise UsageError(
            f"--memory {asked}: sketches of {samples} samples and {len(scope)} tensors take {in_bytes(taken)} even at "
            f"{dim} numbers each; give --memory {-(-taken >> 20)}MiB or more, fewer samples, or --include"
        )
    bar = expected_bar(config, dim, retain)
    told = "" if bar is None else f", error bars of about {bar:.1g}"
    why = f"enough{told}" if dim == wanted else f"all that {asked} holds{told}"
    line = (
        f"compression auto: {AUTO_KIND} to {dim} numbers, {in_bytes(taken)} for {samples} samples and {len(scope)} "
        f"tensors; {why}"
    )
    return dataclasses.replace(config, compression=AUTO_KIND, sketch_dim=dim, memory=None), line


def expected_bar(config: RankConfig, dim: int, retain: int) -> float | None:
    """The relative error bar that a one-sided sketch leaves, for gradients far from parallel; None if unknown.

    From (9) of docs/method.md: half of the bar of `x`, whose noise is `nu sqrt(8 / n)` by DataInf's formula, and
    `nu sqrt(2 n / (1 - n nu))` by the true inverse, which fits all `n` gradients.
    """
    if config.canonical_method in ("first-order", "memflex"):
        return None
    n = max(1, retain)
    if config.curvature == "woodbury":
        return 0.5 * BAR * (2.0 * n / (1.0 - n / dim)) ** 0.5 / dim if dim > n else 1.0
    return 0.5 * BAR * (8.0 / n) ** 0.5 / dim


def _useful_dim(config: RankConfig, retain: int) -> int:
    """The least power of two beyond which error bars are small."""
    if config.canonical_method in ("first-order", "memflex"):
        return FIRST_ORDER_DIM
    small = SMALL_WOODBURY_BAR if config.curvature == "woodbury" else SMALL_BAR
    dim = LEAST_DIM
    while dim < LARGEST_DIM and expected_bar(config, dim, retain) > small:
        dim *= 2
    return dim


def sketch_bytes(scope: Sequence[TensorInfo], dim: int, samples: int, itemsize: int) -> int:
    """Bytes of the sketches of all samples; tensors of at most `dim` entries are kept as they are."""
    return samples * itemsize * sum(min(info.numel, dim) for info in scope)
