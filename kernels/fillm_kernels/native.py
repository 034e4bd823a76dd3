"""The compiled extensions, or in words why they are not there."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from fillm_kernels.errors import BackendError

extension: ModuleType | None
try:
    extension = importlib.import_module("fillm_kernels._C")
except ImportError as error:
    extension = None
    refusal: str | None = f"the compiled extension fillm_kernels._C is missing or does not load ({error})"
else:
    refusal = None

DTYPE_CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
"""Element types by the number the extension knows them by (csrc/cpu/ghost_norm.h)."""

Address = tuple[int, int, int, int]


def address(matrix: Tensor) -> Address:
    """Where the entries of a CPU matrix of any strides lie: address, row stride, column stride, element type."""
    return matrix.data_ptr(), *matrix.stride(), DTYPE_CODES[str(matrix.dtype).removeprefix("torch.")]


def instruction_sets() -> list[str]:
    """Instruction sets that this processor and the extension both have, slowest first; empty without the extension."""
    return list(extension.instruction_sets()) if extension is not None else []


@functools.cache
def _load_cuda() -> ModuleType | str:
    try:
        return importlib.import_module("fillm_kernels._CUDA")
    except ImportError as error:
        return (
            f"the CUDA extension fillm_kernels._CUDA is missing or does not load ({error}); it is built where nvcc is "
            "found, or with FILLM_CUDA=ON"
        )


def cuda_refusal() -> str | None:
    """Why the CUDA extension cannot run here, or None if it can. Asks torch for a device, and loads the extension."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: no GPU, no driver, or a build of torch without CUDA"
    loaded = _load_cuda()
    return loaded if isinstance(loaded, str) else None


def cuda_extension() -> ModuleType:
    """The CUDA extension, loaded at the first call.

    Raises:
        BackendError: if it is missing.
    """
    loaded = _load_cuda()
    if isinstance(loaded, str):
        raise BackendError(loaded)
    return loaded
