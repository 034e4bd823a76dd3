"""Unlearn inside a mask: losses, optimisers that touch nothing else, and the proof that nothing else moved."""

from fillm.lazy import lazy_names

_HOMES = {
    "MaskCallback": "callback",
    "MaskedOptimizer": "masked_optimizer",
    "Sophia": "sophia",
    "UnlearnConfig": "config",
    "UnlearnResult": "results",
    "Untouched": "untouched",
    "Verification": "untouched",
    "frozen_outside": "freezing",
    "unlearn_model": "command",
}
__all__ = list(_HOMES)

__getattr__ = lazy_names(__name__, _HOMES)
