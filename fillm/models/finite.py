"""Which of a model's weights is not finite, for the message about a loss that is not."""

from torch import nn


def spoilt_weight(model: nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or infinity; None if all are finite."""
    spoilt = (name for name, weight in model.named_parameters() if not bool(weight.isfinite().all()))
    return next(spoilt, None)
