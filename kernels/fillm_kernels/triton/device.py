"""Launches go to the tensor's own device, on the stream that is current there."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's CUDA device current inside the block; nothing to do for CPU tensors (the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
