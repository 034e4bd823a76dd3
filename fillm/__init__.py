"""Where a language model's weights hold what it must forget: ranking, masks, unlearning, evaluation.

Importing this package loads neither torch nor triton; the names below load what they need when they are first used.
"""

from fillm.lazy import lazy_names

__version__ = "0.1.0"
__all__ = ["Mask", "Ranking", "__version__", "finetune_model", "rank_parameters"]

__getattr__ = lazy_names(
    __name__, {"Mask": "masks", "Ranking": "rank", "rank_parameters": "rank", "finetune_model": "finetune"}
)
