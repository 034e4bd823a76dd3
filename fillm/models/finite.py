"""Which of a model's weights is not finite, for the message about a loss that is not."""

from torch import nn

from fillm.models.sharded_tensors import local


def spoilt_weight(model: nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or infinity; None if all are finite.

    Of sharded weights only this process's part is looked at: the others need not ask at the same time.
    """
    spoilt = (name for name, weight in model.named_parameters() if not bool(local(weight).isfinite().all()))
    return next(spoilt, None)


def not_finite(model: nn.Module, what: str) -> str:
    """What to say of a number that a model computed and that is none: the weight it comes from, or what to try.

    Args:
        model: that computed it.
        what: was computed, such as `a probability of sample 3`.
    """
    spoilt = spoilt_weight(model)
    if spoilt is None:
        return f"{what} is not a number; give --dtype float32"
    return f"{what} is not a number: {spoilt} holds NaN or infinity; give a model whose weights are finite"
