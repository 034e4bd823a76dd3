"""How far the weights of a saved model are from those of another, read from their files a piece at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fillm.documents import read_json_document
from fillm.errors import FillmError, RunFolderError
from fillm.models import catalogue
from fillm.rank.config import RankConfig
from fillm.rank.unloaded_model import meta_model

_PIECE = 1 << 24  # entries that are widened to float64 at a time


@dataclass(frozen=True)
class TensorShift:
    """One tensor of two models.

    Attributes:
        kind: of `fillm.models.KINDS`.
        layer: -1 if none.
        shift: sum of the squared differences, float64 arithmetic.
        base: sum of the squared weights before.
    """

    kind: str
    layer: int
    shift: float
    base: float


def model_shift(base: Path, after: Path) -> tuple[dict[str, TensorShift], list[str]]:
    """Every tensor that both folders hold in one shape, and the names of those that only one does.

    Args:
        base: a folder as `save_pretrained` writes it, safetensors.
        after: the same.

    Raises:
        RunFolderError: if one of them holds no weights that can be read.
    """
    files = [_weights(folder) for folder in (base, after)]
    places = _places(after)
    found: dict[str, TensorShift] = {}
    try:
        for name in sorted(set(files[0]) & set(files[1])):
            with safe_open(files[0][name], "pt") as one, safe_open(files[1][name], "pt") as other:
                before, then = one.get_tensor(name).flatten(), other.get_tensor(name).flatten()
            if before.numel() == then.numel():
                kind, layer = places.get(name) or _guessed(name)
                found[name] = TensorShift(kind, layer, *_sums(before, then))
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{base} and {after}: cannot be compared: {' '.join(str(error).split())}") from None
    return found, sorted({*files[0], *files[1]} - set(found))


def _sums(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    shift = base = 0.0
    for old, new in zip(before.split(_PIECE), after.split(_PIECE), strict=True):
        old, new = old.double(), new.double()
        shift += float((new - old).square().sum())
        base += float(old.square().sum())
    return shift, base


def _weights(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    try:
        whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if whole.is_file():
            with safe_open(whole, "pt") as file:
                return {name: whole for name in file.keys()}  # noqa: SIM118 (no mapping)
        listed: Mapping[str, str] = read_json_document(index)["weight_map"]
        return {name: folder / file for name, file in listed.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{folder}: no weights that can be read: {' '.join(str(error).split())}") from None


def _places(folder: Path) -> dict[str, tuple[str, int]]:
    """Kind and layer by the name that the model gives a tensor; empty where its configuration tells none."""
    try:
        tensors = catalogue(meta_model(RankConfig(model=str(folder))))
    except FillmError:
        return {}
    return {name: (tensor.kind, tensor.layer) for tensor in tensors for name in (tensor.name, *tensor.tied)}


def _guessed(name: str) -> tuple[str, int]:
    """Of a tensor that the saved model calls by another name than the loaded one (experts, one by one)."""
    parts = name.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), -1)
    return "expert" if "experts" in parts else "other", layer
