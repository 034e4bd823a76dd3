"""Matrix products whose precision is stated: float32 means IEEE float32, whatever the process-wide switches say."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fillm_kernels.arguments import accumulation_dtype


@contextmanager
def ieee_products() -> Iterator[None]:
    """Keep float32 products at IEEE float32 inside the block: no TF32 on CUDA, no bfloat16 passes on the CPU.

    The switches are process-wide (`torch.set_float32_matmul_precision`), so they are put back afterwards, and touched
    only where they differ.
    """
    changed = []
    for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        before = switch.fp32_precision
        if before not in ("ieee", "none"):
            switch.fp32_precision = "ieee"
            changed.append((switch, before))
    try:
        yield
    finally:
        for switch, before in changed:
            switch.fp32_precision = before


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with float32 (float64 for float64) accumulation and result, for matrices or batches of them.

    Args:
        a: [..., M, K], floating.
        b: [..., K, N], floating; a narrower type than `a`'s is widened.

    Returns:
        [..., M, N], float32 or float64.
    """
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        # Products of two 8- or 11-bit significands are exact in float32, so the tensor cores lose nothing here.
        multiply = torch.bmm if a.ndim == 3 else torch.mm
        return multiply(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(accumulation_dtype(a.dtype), accumulation_dtype(b.dtype))
    return a.to(dtype) @ b.to(dtype)
