"""The compiled extension, or in words why it is not there."""

from types import ModuleType

from torch import Tensor

extension: ModuleType | None
try:
    from fillm_kernels import _C as extension
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
