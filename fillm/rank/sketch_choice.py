"""Which sketch a run takes, where the settings leave it open: what a store was made with."""

import dataclasses

from fillm.errors import UsageError
from fillm.rank.config import RankConfig
from fillm.statistics import SketchStore, holds_store


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
