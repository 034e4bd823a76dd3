"""Where a language model's weights hold what it must forget: ranking, masks, unlearning, evaluation.

Importing this package loads neither torch nor triton; the names below load what they need when they are first used.
"""

from fillm.lazy import lazy_names

__version__ = "0.1.0"
_HOMES = {
    "Mask": "masks",
    "MaskCallback": "unlearn",
    "MaskedOptimizer": "unlearn",
    "Ranking": "rank",
    "Sophia": "unlearn",
    "Untouched": "unlearn",
    "Verification": "unlearn",
    "evaluate_model": "evaluate",
    "finetune_model": "finetune",
    "frozen_outside": "unlearn",
    "rank_parameters": "rank",
    "unlearn_model": "unlearn",
}
__all__ = [*_HOMES, "__version__"]

__getattr__ = lazy_names(__name__, _HOMES)
