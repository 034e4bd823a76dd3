"""Per-sample gradients as plain bytes and back, for another process: JSON of what they are, their tensors in a row."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fillm.capture.combined import ScaledGradients, StackedGradients, SummedGradients, TiedGradients
from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients, PerSampleGradients

_ALIGNED = 16  # bytes: where a tensor of any type may begin

Batches = Sequence[tuple[PerSampleGradients, Tensor]]  # each with its samples' positions [B]


def pack(batches: Batches, device: torch.device) -> tuple[str, Tensor]:
    """What `unpack` makes the same gradients of, to the bit.

    Args:
        batches: of one tensor, none to any number.
        device: where they are.

    Returns:
        JSON, and [bytes] uint8 on the device.
    """
    tensors: list[Tensor] = []
    described = [[_described(gradients, tensors), positions.tolist()] for gradients, positions in batches]
    layout = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    parts = []
    for tensor in tensors:
        part = tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)
        parts += [part, part.new_zeros(-part.numel() % _ALIGNED)]
    data = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=device)
    return json.dumps({"batches": described, "tensors": layout, "bytes": data.numel()}), data


def packed_bytes(described: str) -> int:
    """The size of the data that belongs to a description of `pack`."""
    return int(json.loads(described)["bytes"])


def unpack(described: str, data: Tensor) -> list[tuple[PerSampleGradients, Tensor]]:
    """The batches that were packed; their tensors are views of the data."""
    said = json.loads(described)
    types = [(getattr(torch, name), torch.Size(shape)) for name, shape in said["tensors"]]
    sizes = [shape.numel() * dtype.itemsize for dtype, shape in types]
    begins = accumulate((size + -size % _ALIGNED for size in sizes), initial=0)
    tensors = [
        data[begin : begin + size].view(dtype).view(shape)
        for (begin, _), size, (dtype, shape) in zip(pairwise(begins), sizes, types, strict=True)
    ]
    return [(_made(one, tensors), torch.tensor(where, dtype=torch.int64)) for one, where in said["batches"]]


def _described(gradients: PerSampleGradients, tensors: list[Tensor]) -> dict[str, Any]:
    """Plain values, in which tensors are numbers of what has been added to `tensors`."""

    def noted(*some: Tensor) -> list[int]:
        tensors.extend(some)
        return list(range(len(tensors) - len(some), len(tensors)))

    if isinstance(gradients, OuterGradients):
        return {"outer": noted(gradients.x, gradients.dy, gradients.offsets)}
    if isinstance(gradients, LookupGradients):
        return {"lookup": noted(gradients.ids, gradients.dy, gradients.offsets), "rows": gradients.shape[0]}
    if isinstance(gradients, DenseGradients):
        return {"dense": noted(gradients.values)}
    if isinstance(gradients, ScaledGradients):
        return {"scaled": _described(gradients.inner, tensors), "factor": gradients.factor}
    if isinstance(gradients, StackedGradients):
        slices = [[index, _described(part, tensors)] for index, part in gradients.slices.items()]
        return {"stacked": slices, "shape": list(gradients.shape), "samples": gradients.num_samples}
    if isinstance(gradients, TiedGradients):
        both = [_described(part, tensors) for part in (gradients.lookup, gradients.outer)]
        return {"tied": both, "samples": gradients.num_samples}
    if isinstance(gradients, SummedGradients):
        return {"summed": [_described(part, tensors) for part in gradients.parts], "samples": gradients.num_samples}
    raise TypeError(f"{type(gradients).__name__} is not packed")


def _made(said: Mapping[str, Any], tensors: Sequence[Tensor]) -> PerSampleGradients:
    match said:
        case {"outer": numbers}:
            return OuterGradients(*(tensors[i] for i in numbers))
        case {"lookup": numbers, "rows": rows}:
            return LookupGradients(*(tensors[i] for i in numbers), rows)
        case {"dense": [number]}:
            return DenseGradients(tensors[number])
        case {"scaled": inner, "factor": factor}:
            return ScaledGradients(_made(inner, tensors), factor)
        case {"stacked": slices, "shape": shape, "samples": samples}:
            made = {index: _made(part, tensors) for index, part in slices}
            return StackedGradients(made, torch.Size(shape), samples)
        case {"tied": [lookup, outer], "samples": samples}:
            return TiedGradients(_made(lookup, tensors), _made(outer, tensors), samples)
        case {"summed": parts, "samples": samples}:
            return SummedGradients([_made(part, tensors) for part in parts], samples)
    raise ValueError(f"not packed gradients: {said}")
