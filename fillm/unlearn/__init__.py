"""Unlearn inside a mask: optimisers that touch nothing else, and the proof that nothing else moved."""

from fillm.lazy import lazy_names

__all__ = ["MaskCallback", "MaskedOptimizer", "Sophia", "Untouched", "Verification", "frozen_outside"]

__getattr__ = lazy_names(
    __name__,
    {
        "MaskCallback": "callback",
        "MaskedOptimizer": "masked_optimizer",
        "Sophia": "sophia",
        "Untouched": "untouched",
        "Verification": "untouched",
        "frozen_outside": "freezing",
    },
)
