"""A kernel with the block sizes it ships with: launched from here and compiled ahead of time from here."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fillm_kernels.dispatch import interpreted

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Configuration:
    """Compile-time constants and launch options of one kernel.

    Attributes:
        constants: values of the kernel's `tl.constexpr` parameters.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Options of the compiler; fused multiply-add is named, since newer Triton versions change the default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, as the compile check wants it.

    Attributes:
        name: op, kernel and element type, for the report.
        kernel: the jitted function.
        configuration: what it ships with.
        types: Triton type of every parameter that is no constant, in order.
        constants: constants beside those of the configuration.
        matrix: whether bfloat16 or float16 products must run on the matrix units.
        aligned: whether addresses and sizes are multiples of 16 (`is_aligned`).
        counts: integer parameters that are no multiples of 16 even then: numbers of rows, tiles, steps.
    """

    name: str
    kernel: Any
    configuration: Configuration
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    matrix: bool = False
    aligned: bool = True
    counts: Sequence[str] = ()


def is_aligned(matrices: Sequence[Tensor], *sizes: int) -> bool:
    """Whether addresses, strides of rows and widths of matrices, and other sizes, are multiples of 16.

    Triton then loads 16 bytes at a time. Otherwise every entry has an address of its own, which takes registers, so an
    odd shape runs in a configuration of smaller tiles.
    """
    numbers = [*sizes, *(n for m in matrices for n in (m.data_ptr(), m.stride(0), m.shape[1]))]
    return all(number % 16 == 0 for number in numbers)


def launch_kernel(kernel: Any, programs: int, configuration: Configuration, *arguments: Any, **constants: Any) -> None:
    """Launch `programs` programs on the device and current stream of the first argument; none if there are none."""
    if programs == 0:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **configuration.constants, **constants, **configuration.options())


def widen() -> bool:
    """Whether operands are widened before a product: the interpreter multiplies bfloat16 as if it were integers."""
    return interpreted()


def name_of(dtype: torch.dtype, aligned: bool = True) -> str:
    """`bfloat16` for `torch.bfloat16`, with `odd` behind it for shapes that are not aligned."""
    return str(dtype).removeprefix("torch.") + ("" if aligned else " odd")
