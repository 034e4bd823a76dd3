"""What unlearning minimises: every loss a mean over forget samples plus a mean over retain samples (docs/losses.md).

The names are resolved when they are first used, so that a command's settings can be read without loading torch.
"""

from fillm.lazy import lazy_names

__all__ = [
    "DEFAULTS",
    "GRADIENT_LOSSES",
    "LossOptions",
    "UnlearnLoss",
    "canonical_loss",
    "make_loss",
    "resolved_options",
]

__getattr__ = lazy_names(
    __name__,
    {
        "DEFAULTS": "options",
        "GRADIENT_LOSSES": "options",
        "LossOptions": "options",
        "UnlearnLoss": "unlearn_loss",
        "canonical_loss": "options",
        "make_loss": "registry",
        "resolved_options": "options",
    },
)
