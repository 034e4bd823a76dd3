"""Memory of a device that holds its rows of a sharded model (FSDP2), beside these rows.

`fillm.models.load_sharded` makes a unit of every decoder layer and one of all that stands outside. The outer unit stays
gathered through a batch. Of the layers two are in memory at a time: the one that computes, and what is gathered for the
next or is not yet released of the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fillm.errors import ModelError
from fillm.models import TensorInfo
from fillm.models.sharding import decoder_layers
from fillm.rank.plan_devices import Devices


@dataclass(frozen=True)
class Units:
    """A model's tensors as FSDP2 gathers them; bytes.

    Attributes:
        outside: of what stands in no decoder layer.
        layers: of each decoder layer.
        layer_of: number of the layer of every tensor in one.
    """

    outside: int
    layers: tuple[int, ...]
    layer_of: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> "Units":
        """Of a model with values or on the meta device.

        Raises:
            ModelError: its decoder layers are not told.
        """
        paths = {id(module): path for path, module in model.named_modules()}
        prefixes = [f"{paths[id(layer)]}." for layer in decoder_layers(model)]
        if not prefixes:
            raise ModelError("--shard: transformers does not tell this model's decoder layers, so it is not sharded")
        layer_of: dict[str, int] = {}
        sizes, outside = [0] * len(prefixes), 0
        for name, parameter in model.named_parameters():
            size = parameter.numel() * parameter.element_size()
            layer = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
            if layer is None:
                outside += size
            else:
                layer_of[name] = layer
                sizes[layer] += size
        return cls(outside, tuple(sizes), layer_of)


def gathered_bytes(
    model: nn.Module, scope: Sequence[TensorInfo], devices: Devices, itemsize: int, tokens: int, logits: int
) -> dict[str, int]:
    """What a pass gathers at a time.

    Args:
        model: with values or on the meta device.
        scope: tensors to rank.
        devices: that it is spread over.
        itemsize: of an accumulator's entry.
        tokens: of the largest batch, padding included.
        logits: bytes of the logits and their gradients, which are gone before the layers' backward.

    Raises:
        ModelError: as `Units.of`.
    """
    units, width = Units.of(model), next(iter(model.parameters())).element_size()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    handed = {name for name, parameter in model.named_parameters() if head is not None and parameter is head.weight}
    most, held = 0, [0] * len(units.layers)
    largest = [0] * len(units.layers)
    for info in scope:
        # A whole tensor as it is summed, what comes in from the others, and its sum in float64.
        size = 2 * itemsize * info.numel + 8 * devices.held(info.shape)
        layer = units.layer_of.get(info.name)
        if layer is not None:
            largest[layer] = max(largest[layer], size)
            if len(info.shape) > 1:  # output gradients stay until the layer's backward is through
                held[layer] += width * tokens * info.shape[-2]
        elif info.name in handed and not tied:  # while all activations are there
            most = max(most, size)
    at_a_layer = max(a + b for a, b in zip(largest, held, strict=True)) - logits
    return {
        "embeddings and head, gathered": units.outside,
        "two layers, gathered": 2 * max(units.layers),
        "a tensor's sums and what the others send": max(most, at_a_layer, 0),
    }


def check_bytes(model: nn.Module, scope: Sequence[TensorInfo], devices: Devices, itemsize: int) -> dict[str, int]:
    """What the check against autograd takes before the passes (`fillm.capture.verify_sharded`); as `gathered_bytes`."""
    units, width = Units.of(model), next(iter(model.parameters())).element_size()
    held = sum(devices.held(info.shape) for info in scope)
    outside = sum(info.numel for info in scope if info.name not in units.layer_of)
    inside = [0] * len(units.layers)
    for info in scope:
        if info.name in units.layer_of:
            inside[units.layer_of[info.name]] += info.numel
    return {
        "gradients of two samples": 2 * itemsize * held,
        "their gradients by autograd": width * held,
        "embeddings and head, gathered": units.outside,
        "two layers, gathered": 2 * max(units.layers),
        # Of the layers as each is through; of the rest at the end, when all of it is there.
        "whole gradients, and a copy for the reduction": width * (outside + max(outside, 2 * max(inside))),
    }
