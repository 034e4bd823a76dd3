"""Which sketch a run takes, where the settings leave it open: what a store was made with, or what fits the memory."""

import dataclasses
from collections.abc import Sequence

from fillm.errors import UsageError
from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.plan_lines import in_bytes
from fillm.rank.sketching import parse_size
from fillm.statistics import SketchStore, holds_store

AUTO_KIND = "countsketch"
AUTO_MEMORY = "8GiB"
AUTO_DIM, LEAST_DIM, LARGEST_DIM = 4096, 64, 1 << 16
WOODBURY_ROOM = 8  # numbers a sketch, for every retain sample, that the true inverse is given where the memory allows


def with_sketches_chosen(config: RankConfig) -> RankConfig:
    """The settings with kind, size and type of sketches filled in.

    Raises:
        StoreError: if the store cannot be read.
        UsageError: if there is neither a store nor a kind to build one with, or a size that is not the store's.
    """
    if config.store is None or config.compression not in ("none", "auto"):
        return config
    if not holds_store(config.store):
        if config.compression == "auto":
            return config
        raise UsageError(f"--store {config.store}: there is no store yet; give --compression to build one")
    made = SketchStore.open(config.store).manifest.settings
    for option, given, default, found in (
        ("--sketch-dim", config.sketch_dim, 4096, made.sketch_dim),
        ("--sketch-dtype", config.sketch_dtype, "float32", made.dtype),
    ):
        if given not in (default, found):
            raise UsageError(f"{option} {given}: {config.store} was made with {found}; leave it out")
    return dataclasses.replace(config, compression=made.kind, sketch_dim=made.sketch_dim, sketch_dtype=made.dtype)


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
    wanted = AUTO_DIM
    if config.curvature == "woodbury":
        wanted = min(max(AUTO_DIM, 1 << (WOODBURY_ROOM * retain - 1).bit_length()), LARGEST_DIM)
    dim = wanted
    while dim > LEAST_DIM and sketch_bytes(scope, dim, samples, itemsize) > budget:
        dim //= 2
    taken = sketch_bytes(scope, dim, samples, itemsize)
    if taken > budget:
        raise UsageError(
            f"--memory {asked}: sketches of {samples} samples and {len(scope)} tensors take {in_bytes(taken)} even at "
            f"{dim} numbers each; give --memory {-(-taken >> 20)}MiB or more, fewer samples, or --include"
        )
    why = "more would tell little" if dim == wanted else f"{2 * dim} would take more than {asked}"
    line = (
        f"compression auto: {AUTO_KIND} to {dim} numbers, {in_bytes(taken)} for {samples} samples and {len(scope)} "
        f"tensors; {why}"
    )
    return dataclasses.replace(config, compression=AUTO_KIND, sketch_dim=dim, memory=None), line


def sketch_bytes(scope: Sequence[TensorInfo], dim: int, samples: int, itemsize: int) -> int:
    """Bytes of the sketches of all samples; tensors of at most `dim` entries are kept as they are."""
    return samples * itemsize * sum(min(info.numel, dim) for info in scope)
