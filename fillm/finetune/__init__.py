"""Makes the model that is to forget: `python -m fillm.finetune`, or `finetune_model` in Python."""

from fillm.finetune.config import FinetuneConfig
from fillm.finetune.run import FinetuneResult, finetune_model

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune_model"]
