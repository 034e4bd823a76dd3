"""Makes the model that is to forget: `python -m fillm.finetune`, or `finetune_model` in Python."""

from fillm.lazy import lazy_names

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune_model"]

__getattr__ = lazy_names(__name__, {"FinetuneConfig": "config", "FinetuneResult": "run", "finetune_model": "run"})
