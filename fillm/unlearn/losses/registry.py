"""From a name and its options to a loss."""

from fillm.unlearn.losses.ascent import GradientAscent, GradientDifference, RetainedDistribution
from fillm.unlearn.losses.misdirection import Misdirection
from fillm.unlearn.losses.options import LossOptions, canonical_loss, resolved_options
from fillm.unlearn.losses.preference import DirectPreference, NegativePreference, SimpleNegativePreference
from fillm.unlearn.losses.refusal import Refusal
from fillm.unlearn.losses.self_distillation import SelfDistillation
from fillm.unlearn.losses.unlearn_loss import UnlearnLoss
from fillm.unlearn.losses.weighted_ascent import SaturationImportance, WeightedAscent

_CLASSES: dict[str, type[UnlearnLoss]] = {
    loss.name: loss
    for loss in (
        GradientAscent,
        GradientDifference,
        RetainedDistribution,
        Refusal,
        DirectPreference,
        NegativePreference,
        SimpleNegativePreference,
        Misdirection,
        SelfDistillation,
        WeightedAscent,
        SaturationImportance,
    )
}


def make_loss(name: str, options: LossOptions | None = None) -> UnlearnLoss:
    """A loss by any of its names.

    Args:
        name: such as `npo`, or a published spelling such as `GradDiff`.
        options: what differs from the published defaults.

    Raises:
        UsageError: if the loss is unknown, has no use for an option that was set, or a value is out of range.
    """
    options = options or LossOptions()
    settings = resolved_options(name, options)
    settings.pop("idk", None)  # it says what the alternatives are, which are handed over as batches
    return _CLASSES[canonical_loss(name)](seed=options.seed, **settings)
