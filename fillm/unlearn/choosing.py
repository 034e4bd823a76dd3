"""Where to unlearn: the mask that the settings ask for, and whether it is one of this model."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fillm.data import SampleSet
from fillm.errors import UsageError
from fillm.masks import Mask, parse_select
from fillm.models import DTYPES, model_fingerprint
from fillm.rank.config import WITH_UPDATE
from fillm.rank.ranking import Ranking
from fillm.unlearn.config import UnlearnConfig

PER_SAMPLE = "soir-per-sample"


def chosen_mask(config: UnlearnConfig, ranking: Ranking | None) -> tuple[Mask, dict[str, Mask] | None]:
    """The mask of `--mask`, or of `--ranking` and `--select`.

    Args:
        config: the settings.
        ranking: what `--ranking` names, loaded.

    Returns:
        The mask; and, of a ranking of single samples, the masks by sample of which it is the union.

    Raises:
        UsageError, MaskError, RunFolderError: one line.
    """
    if config.mask is not None:
        return Mask.load(config.mask), None
    assert ranking is not None and config.select is not None
    choice = {**parse_select(config.select), "include": config.include, "exclude": config.exclude}
    if ranking.method != PER_SAMPLE:
        return ranking.select(**choice), None
    masks = ranking.select_per_sample(**choice)
    return reduce(or_, masks.values()), masks


def check_made_for(mask: Mask, model: nn.Module, fingerprint: str) -> None:
    """Refuses a mask of another model. The same weights held in another floating-point type are the same model.

    Args:
        mask: with the fingerprint of the model that was ranked, if that is known.
        model: with its weights.
        fingerprint: of it.

    Raises:
        UsageError: naming the first tensor that does not fit, or both fingerprints; or a mask that selects nothing.
    """
    mask.check(model)
    if not mask.count:
        raise UsageError("the mask selects no weight: nothing could be unlearned")
    if not _same_weights(mask.model_fingerprint, model, fingerprint):
        mask.check(model, fingerprint)


def updates_for(ranking: Ranking, model: nn.Module, fingerprint: str) -> Mapping[str, Tensor] | None:
    """`u` of a ranking of this model by tensor, None where it holds none.

    Args:
        ranking: with the fingerprint of the model that was ranked, if that is known.
        model: with its weights.
        fingerprint: of it.

    Raises:
        UsageError: a method whose `update.safetensors` holds something else, or a ranking of another model.
    """
    if ranking.method not in WITH_UPDATE:
        methods = " or ".join(WITH_UPDATE)
        raise UsageError(f"--loss influence: a ranking by {ranking.method} has no u; rank with --method {methods}")
    if not _same_weights(ranking.model_fingerprint, model, fingerprint):
        raise UsageError(
            f"--loss influence: the ranking is of other weights (fingerprints {ranking.model_fingerprint[:12]}... "
            f"and {fingerprint[:12]}...); rank the model that is to forget"
        )
    return ranking.updates


def _same_weights(made_for: str | None, model: nn.Module, fingerprint: str) -> bool:
    """Whether a model is the one of a fingerprint, as far as that is known, in whatever floating-point type."""
    return made_for in (None, fingerprint) or any(
        made_for == model_fingerprint(model, dtype) for dtype in DTYPES.values()
    )


def reached_by(masks: Mapping[str, Mask] | None, samples: SampleSet) -> Sequence[frozenset[str]] | None:
    """Of every forget sample the tensors of its own mask; None where there is one mask for all.

    Raises:
        UsageError: a sample that the ranking knows nothing of.
    """
    if masks is None:
        return None
    if (unknown := next((sample.id for sample in samples if sample.id not in masks), None)) is not None:
        raise UsageError(f"--ranking has no ranking of the sample {unknown}; rank the same --forget rows")
    return [frozenset(masks[sample.id]) for sample in samples]


def adapted_modules(model: nn.Module, mask: Mask) -> list[str]:
    """Paths of the linear layers whose whole weights a mask selects, for `--lora-rank`.

    Raises:
        UsageError: a part of a tensor, or a tensor that takes no adapter.
    """
    modules = dict(model.named_modules())
    paths = []
    for name in mask.tensor_names():
        path, _, own = name.rpartition(".")
        if own == "weight" and isinstance(modules[path], nn.Linear | Conv1D):
            paths.append(path)
        elif own != "bias" or not isinstance(modules[path], nn.Linear | Conv1D):
            raise UsageError(f"--lora-rank: {name} is no linear layer's weight; select without it (--include mlp,attn)")
    if not paths:
        raise UsageError("--lora-rank: the mask selects no linear layer's weight; select some (--include mlp,attn)")
    return paths
