"""No gradient where nothing is selected: weight gradients never formed, layers that backward never enters."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from fillm_kernels.arguments import accumulation_dtype
from torch import nn

from fillm.errors import UsageError
from fillm.models import TensorInfo, catalogue
from fillm.unlearn.matching import Masked, masked_parameters, parameters_of


def frozen_outside(model: nn.Module, mask: Mapping[str, Any]) -> "Freezing":
    """Ask for gradients of the tensors with something selected, and of no others; from now on.

    Autograd then forms no weight gradient elsewhere and does not enter the layers below the lowest selected tensor. For
    that, embeddings that transformers has made to ask for gradients of their output no longer do: it does so with all
    gradient checkpointing, and only the reentrant kind needs it. As a context manager it undoes both at the end.

    Args:
        model: its parameters' `requires_grad` is set.
        mask: a `fillm.Mask` of it.

    Returns:
        What it saves, in `savings`.

    Raises:
        UsageError: a mask that does not fit the model; reentrant gradient checkpointing.
    """
    masked = masked_parameters(mask, parameters_of(model), "the model")
    _refuse_reentrant_checkpointing(model)
    askers = [module for module in model.modules() if getattr(module, "_require_grads_hooks", None)]
    for module in askers:
        module.disable_input_require_grads()
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {item.parameter for item in masked}
    for parameter in before:
        parameter.requires_grad_(parameter in chosen)
    return Freezing(_savings(model, masked), before, askers)


class Freezing(AbstractContextManager["Freezing"]):
    """What `frozen_outside` did.

    Attributes:
        savings: `tensors` and `tensors_trained`; `layers` of the model, and how many of them backward does not enter,
            `layers_without_backward`; `lowest_layer` of the selected tensors (-1: the embedding, None: above all
            layers, or nothing); `weight_gradient_bytes` and `weight_gradient_bytes_saved`; `state_bytes` that AdamW
            or Sophia holds and `state_bytes_saved`, both beside training every weight.
    """

    def __init__(
        self, savings: dict[str, int | None], before: dict[nn.Parameter, bool], askers: list[nn.Module]
    ) -> None:
        self.savings, self._before, self._askers = savings, before, askers

    def restore(self) -> None:
        """Give every tensor its old `requires_grad` back, and embeddings what they asked for."""
        for parameter, wanted in self._before.items():
            parameter.requires_grad_(wanted)
        for module in self._askers:
            module.enable_input_require_grads()

    def __exit__(self, *_: object) -> None:
        self.restore()


def _refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """It gives no gradient to a layer whose input needs none, as that of the lowest selected layer."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise UsageError(
                "reentrant gradient checkpointing gives frozen layers' neighbours no gradient; "
                "turn it on with {'use_reentrant': False}"
            )


def _savings(model: nn.Module, masked: list[Masked]) -> dict[str, int | None]:
    infos, parameters = catalogue(model), list(model.parameters())
    chosen = {item.parameter for item in masked}
    trained = [info for info, parameter in zip(infos, parameters, strict=True) if parameter in chosen]
    layers = {info.layer for info in infos if info.layer >= 0}
    lowest = _lowest(trained)
    gradients = sum(parameter.numel() * parameter.dtype.itemsize for parameter in parameters)
    formed = sum(parameter.numel() * parameter.dtype.itemsize for parameter in chosen)
    state = sum(_state_bytes(parameter, parameter.numel()) for parameter in parameters)
    kept = sum(_state_bytes(item.parameter, item.entry.count) for item in masked)
    return {
        "tensors": len(infos),
        "tensors_trained": len(trained),
        "layers": len(layers),
        "layers_without_backward": len(layers if lowest is None else {layer for layer in layers if layer < lowest}),
        "lowest_layer": lowest,
        "weight_gradient_bytes": formed,
        "weight_gradient_bytes_saved": gradients - formed,
        "state_bytes": kept,
        "state_bytes_saved": state - kept,
    }


def _state_bytes(parameter: nn.Parameter, count: int) -> int:
    return 2 * count * accumulation_dtype(parameter.dtype).itemsize


def _lowest(trained: list[TensorInfo]) -> int | None:
    """The layer down to which backward goes: -1 for an embedding; None if no layer is entered."""
    below = [-1 for info in trained if info.kind == "embed"]
    return min(below + [info.layer for info in trained if info.layer >= 0], default=None)
