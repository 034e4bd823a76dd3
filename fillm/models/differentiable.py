"""Can gradients be had of a model at all? Said before anything is computed."""

from itertools import chain

from torch import nn

from fillm.errors import ModelError


def check_differentiable(model: nn.Module) -> None:
    """Refuses models through which no backward pass can go.

    Raises:
        ModelError: weights made inside `torch.inference_mode()`; flex attention on a CPU.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    if (made := next((name for name, tensor in tensors if tensor.is_inference()), None)) is not None:
        raise ModelError(f"{made} was made inside torch.inference_mode() and takes no gradient; load the model outside")
    kinds = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in model.modules()}
    if "flex_attention" in kinds and next(model.parameters()).device.type == "cpu":
        raise ModelError("flex_attention has no backward pass on a CPU; load the model with attn_implementation='sdpa'")
