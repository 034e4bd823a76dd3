"""A fingerprint of a model's weights, so that what was computed from one model is never used with another."""

import hashlib
import json

import torch
from torch import nn

from fillm.models.sharded_tensors import whole

_PIECE_BYTES = 1 << 26


def model_fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """sha256 over names, shapes, dtypes and bytes of all parameters, in the order of their names.

    The same for the same weights on every device. Weights are streamed in pieces of 64 MiB: the extra memory does not
    grow with the model. Of sharded weights, which all processes ask for together, one tensor at a time is gathered.

    Args:
        model: any module; its parameters must hold values (not be on the meta device).
        dtype: take floating-point parameters as if the model had been loaded in this type.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        taken = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        header = json.dumps([name, list(parameter.shape), str(taken).removeprefix("torch.")])
        digest.update(header.encode() + b"\n")
        flat = whole(parameter.detach()).reshape(-1)
        for piece in flat.split(max(1, _PIECE_BYTES // flat.element_size())):
            # numpy has no bfloat16; bytes it has.
            digest.update(piece.to(taken).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
