"""Which sketch a run takes, where the settings leave it open: what a store was made with, or what fits the memory."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fillm.errors import UsageError
from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.plan_lines import in_bytes
from fillm.rank.sketch_probe import FACTORED, Alikeness, expected_bar
from fillm.rank.sketching import parse_size
from fillm.statistics import BAR, SketchStore, holds_store

AUTO_KINDS = ("countsketch", FACTORED)  # the cheapest of those that form gradients, and of those that do not
AUTO_MEMORY = "8GiB"
LEAST_DIM, LARGEST_DIM = 64, 1 << 18
# Relative error bars that are enough: of a bracket as wide as `--tolerance`, and of the true inverse.
SMALL_BAR, SMALL_WOODBURY_BAR = 5e-4, 1e-2
UNPROMISED_DIM = 4096  # where nothing is promised: what noise does falls with 1/k, without a bound of its own
# Time over plain forward + backward by size, from the timing of benchmarks/results/compression.csv.
OVER_PLAIN = {
    "countsketch": {256: 0.87, 4096: 0.91, 65536: 1.42},
    FACTORED: {256: 0.72, 4096: 0.77, 65536: 1.34},
}


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


@dataclass(frozen=True)
class Option:
    """A kind and size that fits the memory.

    Attributes:
        bar: the relative error bar to be expected of a score; None where nothing is promised.
        enough: whether the bar is as small as is useful.
    """

    kind: str
    dim: int
    bar: float | None
    enough: bool


def chosen_for_memory(
    config: RankConfig,
    scope: Sequence[TensorInfo],
    samples: int,
    retain: int,
    measure: Callable[[], Sequence[Alikeness]] | None = None,
) -> tuple[RankConfig, str]:
    """Settles `--compression auto`: of the kinds and sizes that fit `--memory` the fastest whose error bars are small.

    Args:
        config: the settings.
        scope: tensors to rank.
        samples: of both sets, whose sketches are held at once.
        retain: number of retain samples.
        measure: probes gradients; without it they are taken to be far from parallel.

    Returns:
        The settings with kind and size, and a line that says why.

    Raises:
        UsageError: if not even the smallest sketches fit.
    """
    if config.compression != "auto":
        return config, ""
    asked, itemsize = config.memory or AUTO_MEMORY, 2 if config.sketch_dtype == "bfloat16" else 4
    dims = _dims(config, scope, samples, retain, asked, itemsize)
    # Bars are foretold of `|u|` alone: absolute sums and damages have far wider ones, published scores have none.
    promised = (
        config.canonical_method not in ("first-order", "memflex")
        and config.objective == "forget"
        and config.damping_dimension == "parameter"
    )
    found = measure() if measure is not None and promised else None
    kinds = AUTO_KINDS if found else AUTO_KINDS[:1]
    options = [_option(config, kind, dims, retain, found, promised) for kind in kinds]
    # What is enough beats what is not; then the time, or the bar.
    best = min(options, key=lambda one: (not one.enough, over_plain(one.kind, one.dim) if one.enough else one.bar))
    taken = sketch_bytes(scope, best.dim, samples, itemsize)
    whole = all(info.numel <= best.dim for info in scope)
    bar = "" if best.bar is None or whole else f"error bars of about {100.0 * best.bar:.1g} % expected"
    if bar and measure is None:
        bar += " if gradients are far from parallel (the run measures that and may choose otherwise)"
    if whole:
        why = "every gradient is kept whole"
    elif not best.enough:
        why = "as many numbers as are ever taken" if best.dim == LARGEST_DIM else f"all that {asked} holds"
    elif promised:
        why = "more numbers are not needed"
    else:
        why = "nothing is promised of these, and more numbers (--compression KIND --sketch-dim) tell more"
    facts = (
        f"{in_bytes(taken)} for {samples} samples and {len(scope)} tensors",
        bar,
        f"passes take about {over_plain(best.kind, best.dim):.2g} of plain forward + backward",
        why,
    )
    line = f"compression auto: {best.kind} to {best.dim} numbers, {'; '.join(filter(None, facts))}"
    return dataclasses.replace(config, compression=best.kind, sketch_dim=best.dim, memory=None), line


def _dims(
    config: RankConfig, scope: Sequence[TensorInfo], samples: int, retain: int, asked: str, itemsize: int
) -> list[int]:
    """The powers of two that fit, smallest first; the true inverse takes at least as many numbers as samples."""
    least = LEAST_DIM
    while config.curvature == "woodbury" and least < retain:
        least *= 2
    budget, dims = parse_size(asked), [least]
    while dims[-1] < LARGEST_DIM:
        dims.append(2 * dims[-1])
    fitting = [dim for dim in dims if sketch_bytes(scope, dim, samples, itemsize) <= budget]
    if fitting:
        return fitting
    taken = sketch_bytes(scope, least, samples, itemsize)
    needed = f", which --curvature woodbury takes for {retain} retain samples" if least > LEAST_DIM else ""
    raise UsageError(
        f"--memory {asked}: sketches of {samples} samples and {len(scope)} tensors take {in_bytes(taken)} even at "
        f"{least} numbers each{needed}; give --memory {-(-taken >> 20)}MiB or more, fewer samples, or --include"
    )


def _option(
    config: RankConfig,
    kind: str,
    dims: Sequence[int],
    retain: int,
    found: Sequence[Alikeness] | None,
    promised: bool,
) -> Option:
    """The least size of a kind whose error bars are small, or the one with the smallest."""
    if not promised:
        dim = next((dim for dim in dims if dim >= UNPROMISED_DIM), dims[-1])
        return Option(kind, dim, None, dim >= UNPROMISED_DIM)
    small = SMALL_WOODBURY_BAR if config.curvature == "woodbury" else SMALL_BAR
    for dim in dims:
        if found:
            bar = expected_bar(found, kind, dim, retain, config.curvature)
        else:
            bar = bar_of_unlike(config.curvature, dim, retain)
        if bar <= small:
            return Option(kind, dim, bar, True)
    return Option(kind, dims[-1], bar, False)


def over_plain(kind: str, dim: int) -> float:
    """Time of the passes over plain forward + backward to be expected, linear in the size."""
    (a, b), times = list(OVER_PLAIN[kind])[-2:], OVER_PLAIN[kind]
    if dim > b:
        return times[b] + (times[b] - times[a]) * (dim - b) / (b - a)
    return float(np.interp(dim, list(times), list(times.values())))


def bar_of_unlike(curvature: str, dim: int, retain: int) -> float:
    """The relative error bar that a one-sided sketch leaves, for gradients far from parallel.

    From (9) of docs/method.md: half of the bar of `x`, whose noise is `nu sqrt(8 / n)` by DataInf's formula, and
    `nu sqrt(2 n / (1 - n nu))` by the true inverse, which fits all `n` gradients.
    """
    n = max(1, retain)
    if curvature == "woodbury":
        return 0.5 * BAR * (2.0 * n / (1.0 - n / dim)) ** 0.5 / dim if dim > n else 1.0
    return 0.5 * BAR * (8.0 / n) ** 0.5 / dim


def sketch_bytes(scope: Sequence[TensorInfo], dim: int, samples: int, itemsize: int) -> int:
    """Bytes of the sketches of all samples; tensors of at most `dim` entries are kept as they are."""
    return samples * itemsize * sum(min(info.numel, dim) for info in scope)
