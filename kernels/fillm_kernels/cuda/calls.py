"""Calls into the CUDA extension: on the device and the current stream of the tensors, with errors by name."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.errors import BackendError


def call(function: Callable[..., Any], tensor: Tensor, **arguments: Any) -> None:
    """Call a function that launches kernels on the device and current stream of a tensor.

    Args:
        function: of the extension; takes `device` and `stream` beside the arguments.
        tensor: one of those the kernels work on.
        arguments: what else it takes.

    Raises:
        BackendError: if CUDA refuses a launch; the message is CUDA's.
    """
    device = tensor.device
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        try:
            function(device=device.index or 0, stream=stream, **arguments)
        except RuntimeError as error:
            raise BackendError(str(error)) from error


def dtype_code(tensor: Tensor) -> int:
    """A tensor's element type, by the number the extension knows it by."""
    return native.DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")]
