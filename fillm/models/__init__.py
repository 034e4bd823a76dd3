"""Load a model, catalogue its tensors (kind, layer, ties, adapters), choose among them, find their attention heads."""

from fillm.models.catalogue import KINDS, TensorInfo, catalogue
from fillm.models.differentiable import check_differentiable
from fillm.models.fingerprint import model_fingerprint
from fillm.models.finite import spoilt_weight
from fillm.models.heads import HeadLayout, head_layout
from fillm.models.loading import (
    DTYPES,
    imported_peft,
    load_model,
    load_tokenizer,
    quiet_transformers,
    resolve_device,
    save_tokenizer,
)
from fillm.models.lora import with_lora
from fillm.models.selection import select_tensors
from fillm.models.sharding import load_sharded
from fillm.models.stored import stored_dtypes

__all__ = [
    "DTYPES",
    "KINDS",
    "HeadLayout",
    "TensorInfo",
    "catalogue",
    "check_differentiable",
    "head_layout",
    "imported_peft",
    "load_model",
    "load_sharded",
    "load_tokenizer",
    "model_fingerprint",
    "quiet_transformers",
    "resolve_device",
    "save_tokenizer",
    "select_tensors",
    "spoilt_weight",
    "stored_dtypes",
    "with_lora",
]
