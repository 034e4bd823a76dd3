"""The floating-point types in which a model's files hold its weights, which its config.json need not agree with."""

from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open

from fillm.documents import read_json_document
from fillm.models.loading import local_folder

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def stored_dtypes(model: str) -> dict[str, torch.dtype]:
    """Types by the names that the tensors have in the files; read from the headers alone.

    transformers loads all weights in the type that config.json names, or in that of the first tensor: tensors kept in a
    wider one are rounded without a word.

    Args:
        model: a folder as `save_pretrained` writes it, or a Hub id.

    Returns:
        One entry a floating-point tensor. Empty where the headers cannot be read, or hold types of quantised weights;
        loading the model says what is wrong.
    """
    try:
        folder = local_folder(model)
        if folder is None:
            patterns = [_WHOLE, _INDEX, "model-*-of-*.safetensors"]
            folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
        names = [_WHOLE]
        if not (folder / _WHOLE).is_file():
            names = sorted(set(read_json_document(folder / _INDEX)["weight_map"].values()))
        found = {}
        for name in names:
            with safe_open(str(folder / name), framework="pt") as opened:
                found |= {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return {}
    if any(dtype.startswith("F") and dtype not in _FLOATS for dtype in found.values()):
        return {}
    return {name: _FLOATS[dtype] for name, dtype in found.items() if dtype in _FLOATS}
