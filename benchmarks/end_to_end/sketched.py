"""A ranking from sketches of both sets, as `fillm.rank --compression KIND` does it, from a loaded model on."""

from torch import nn

from fillm.capture import Capture, verify
from fillm.data import SampleSet
from fillm.models import catalogue
from fillm.rank.config import RankConfig
from fillm.rank.console import Console
from fillm.rank.gram_methods import rank_by_gram
from fillm.rank.passes import Passes
from fillm.rank.scoring import Job, Scores


def rank_sketched(
    model: nn.Module, forget: SampleSet, retain: SampleSet, kind: str, dim: int, tokens_per_batch: int | None = None
) -> Scores:
    """Second-order influence of every tensor, cross terms estimated; the check of the rules is included.

    Args:
        model: a causal language model in eval mode.
        forget: samples to forget.
        retain: samples to keep.
        kind: of sketch, one of `fillm.capture.sketching.KINDS`.
        dim: numbers that a tensor's gradient becomes.
        tokens_per_batch: budget, padding included; None is `fillm.rank`'s own.

    Raises:
        UsageError: no such kind, or no such dimension of it.
    """
    scope = catalogue(model)
    capture = Capture(model, [info.name for info in scope])
    verify(capture, retain)
    config = RankConfig(compression=kind, sketch_dim=dim)
    passes = Passes(Console.silent(), tokens_per_batch=tokens_per_batch)
    return rank_by_gram(Job(config, model, scope, capture, forget, retain, passes))
