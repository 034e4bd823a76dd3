"""Matrix products whose precision is stated: float32 means IEEE float32, whatever the process-wide switches say.

On x86 CPUs torch hands float32 and float64 products to MKL, which on AMD processors uses half of the vector width, and
so half of the machine (docs/kernels.md has the figures). csrc/cpu/matmul.cpp uses all of it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import accumulation_dtype

LEAST_WORK = 1 << 20  # multiply-adds; below, the call itself takes as long as the product


_entering = threading.Lock()
_inside = 0
_changed: list[tuple[Any, str]] = []


@contextmanager
def ieee_products() -> Iterator[None]:
    """Keep float32 products at IEEE float32 inside the block: no TF32 on CUDA, no bfloat16 passes on the CPU.

    The switches are process-wide (`torch.set_float32_matmul_precision`), so they are put back afterwards, and touched
    only where they differ: by the first thread that comes in and the last one that leaves.
    """
    global _inside
    with _entering:
        _inside += 1
        for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if _inside == 1 else ():
            before = switch.fp32_precision
            if before not in ("ieee", "none"):
                switch.fp32_precision = "ieee"
                _changed.append((switch, before))
    try:
        yield
    finally:
        with _entering:
            _inside -= 1
            while _inside == 0 and _changed:
                switch, before = _changed.pop()
                switch.fp32_precision = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` as `torch.nn.functional.linear` computes it, without its gradient, on what is faster there.

    That is the compiled extension for large products of float32 or float64 on AMD processors, torch elsewhere.

    Args:
        x: inputs, [..., I].
        weight: [O, I], any strides, same dtype and device.
        bias: [O] or None, likewise.

    Returns:
        [..., O], of the same dtype.
    """
    if not _suits_extension(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _multiply(out.view(-1, weight.shape[0]), rows, weight.T, None if bias is None else bias.contiguous())
    return out


def _multiply(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Set out = a b + bias in the extension: out [M, N], a [M, K], b [K, N], bias [N], contiguous, or None."""
    native.extension.matmul_into(
        m=a.shape[0],
        n=b.shape[1],
        k=a.shape[1],
        a=native.address(a),
        b=native.address(b),
        out=native.address(out),
        k_rows=0,
        k_scale=0,
        bias=0 if bias is None else bias.data_ptr(),
        alpha=1.0,
        accumulate=False,
        threads=torch.get_num_threads(),
        instruction_set="",
    )


def _suits_extension(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    operands = [x, weight] if bias is None else [x, weight, bias]
    if native.extension is None or not native.extension.on_amd():
        return False
    if x.dtype not in (torch.float32, torch.float64) or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return False  # a mistake of the caller's gets torch's own message
    if any(t.dtype != x.dtype or t.device.type != "cpu" or t.layout != torch.strided for t in operands):
        return False
    return x.numel() * weight.shape[0] >= LEAST_WORK and (bias is None or bias.shape == weight.shape[:1])


def product_by_entry(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`product` of matrices, where every entry has bits of its own row and column alone.

    A library's product takes another order for another number of threads, and, where it is narrow, for another place of
    a row. On the CPU the compiled extension sums every entry in the order of its terms.

    Args:
        a: [M, K], floating, any strides.
        b: [K, N], of the same dtype.
        out: [M, N] to write to, float32 (float64 for float64), any strides; None for memory of its own.

    Returns:
        [M, N], float32 or float64.
    """
    if native.extension is None or a.device.type != "cpu":
        return product(a, b) if out is None else out.copy_(product(a, b))
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=accumulation_dtype(a.dtype))
    _multiply(out, a, b, None)
    return out


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
