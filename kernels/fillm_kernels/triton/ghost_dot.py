"""Triton kernel of `ghost_dot`: tiles of dy v, multiplied by x while they are in registers.

A program forms rows x columns of dy v and reduces them to one number a row at once, so the [N, I] product is never
written. Where tiles are few, output features are dealt out as well: sums over some of them add up to the whole. Where v
is float32 beside bfloat16 rows, it is cut into three bfloat16 parts that together hold all 24 bits of its significand:
three passes on the matrix units with exact products, in the place of one on the slow float32 path.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.triton.configurations import (
    DTYPES,
    POINTERS,
    CompileCase,
    Configuration,
    is_aligned,
    launch_kernel,
    name_of,
    widen,
)
from fillm_kernels.triton.tiles import cut, multiply, ragged_case, sum_segments, to_device, unit_rows

# untimed; chosen by `python -m fillm_kernels.compile_check`, bfloat16, registers / KiB of shared memory, no spill:
#              sm_80       sm_90       sm_100      gfx942
#   HALF       184 / 64    124 / 96    142 / 96    136 / 64
#   SPLIT      100 / 32     73 / 52     78 / 52    113 / 32    with 128 features sm_80 spilled (51 LDL and STL)
#   ODD         80 / 16     78 / 16     64 / 16     56 / 16    at odd widths and strides HALF takes 255 on sm_90
HALF = Configuration({"BLOCK_T": 128, "BLOCK_I": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3)
SPLIT = Configuration({"BLOCK_T": 128, "BLOCK_I": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=3)
ODD = Configuration({"BLOCK_T": 64, "BLOCK_I": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=2)
FLOAT = Configuration({"BLOCK_T": 64, "BLOCK_I": 64, "BLOCK_K": 16, "GROUP": 8}, num_warps=4, num_stages=2)
ENOUGH_PROGRAMS = 132  # one for every multiprocessor of the largest GPUs
FEWEST_STEPS = 8  # of BLOCK_K output features, of a program: beside them reading x is little


def shipped(dtype: torch.dtype, v_dtype: torch.dtype, aligned: bool) -> tuple[Configuration, bool, bool]:
    """Configuration, whether v is cut into three parts, and whether x and dy are widened to float32."""
    # float16 has too few exponents to hold the parts of a float32 number.
    if v_dtype == torch.float32 and dtype != torch.bfloat16:
        return FLOAT, False, dtype != v_dtype
    split = dtype != v_dtype
    return (ODD if not aligned else SPLIT if split else HALF), split, False


@triton.jit
def dot_kernel(
    x_ptr,
    dy_ptr,
    v_ptr,
    shares_ptr,
    rows,
    inputs,
    outputs,
    share,
    x_stride,
    dy_stride,
    v_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_V: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of rows x input features, `share` of the output features: the sum of (dy v) * x, one number a row."""
    down, across = tl.cdiv(rows, BLOCK_T), tl.cdiv(inputs, BLOCK_I)
    part = tl.program_id(0) // (down * across)
    tile = tl.program_id(0) % (down * across)
    # Programs that run at the same time share rows of dy and columns of v: GROUP row tiles, column by column.
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tile % (GROUP * across)
    row = ((group * GROUP + within % height) * BLOCK_T).to(tl.int64) + tl.arange(0, BLOCK_T)
    block = within // height
    feature = block * BLOCK_I + tl.arange(0, BLOCK_I)
    kept = (feature < inputs)[None, :]
    inside = tl.minimum(row, rows - 1)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_I), dtype=tl.float32)
    for begin in range(part * share, tl.minimum((part + 1) * share, outputs), BLOCK_K):
        out = begin + tl.arange(0, BLOCK_K)
        dy = tl.load(dy_ptr + inside * dy_stride + out[None, :], mask=(out < outputs)[None, :], other=0.0)
        entries = v_ptr + out.to(tl.int64)[:, None] * v_stride + feature[None, :]
        v = tl.load(entries, mask=(out < outputs)[:, None] & kept, other=0.0)
        if SPLIT_V:
            high, middle, low = cut(v, dy.dtype)
            total = multiply(dy, low, total, WIDEN)
            total = multiply(dy, middle, total, WIDEN)
            total = multiply(dy, high, total, WIDEN)
        else:
            total = multiply(dy, v, total, WIDEN)
    x = tl.load(x_ptr + inside * x_stride + feature[None, :], mask=kept, other=0.0).to(tl.float32)
    place = (row * tl.cdiv(outputs, share) + part) * across + block
    tl.store(shares_ptr + place, tl.sum(tl.where(kept, total * x, 0.0), 1), mask=row < rows)


def launch(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Inner products with v. [N, I], [N, O], [O, I], [B + 1] on the host -> [B], float64."""
    (rows, inputs), outputs = x.shape, dy.shape[1]
    if x.numel() == 0 or dy.numel() == 0:
        return torch.zeros(offsets.shape[0] - 1, dtype=torch.float64, device=x.device)
    x, dy, v = unit_rows(x), unit_rows(dy), unit_rows(v)
    configuration, split, widened = shipped(x.dtype, v.dtype, is_aligned((x, dy, v)))
    down = triton.cdiv(rows, configuration.constants["BLOCK_T"])
    across = triton.cdiv(inputs, configuration.constants["BLOCK_I"])
    block = configuration.constants["BLOCK_K"]
    steps = triton.cdiv(outputs, block)
    # Whole steps, so that no feature is taken twice.
    share = block * triton.cdiv(steps, max(1, min(ENOUGH_PROGRAMS // (down * across), steps // FEWEST_STEPS)))
    parts = triton.cdiv(outputs, share)
    shares = torch.empty(rows, parts * across, dtype=torch.float32, device=x.device)
    sizes = (rows, inputs, outputs, share, x.stride(0), dy.stride(0), v.stride(0))
    constants = {"SPLIT_V": split, "WIDEN": widened or widen()}
    launch_kernel(dot_kernel, parts * down * across, configuration, x, dy, v, shares, *sizes, **constants)
    return sum_segments(shares, to_device(offsets, x.device)).sum(1)


def small_case(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """More than one tile each way, for the check at first use: aligned widths and others, v in float32 and as x."""
    cases = []
    for inputs, outputs in ((144, 48), (136, 40)):
        x, dy, offsets = ragged_case([5, 0, 130, 1], inputs, outputs, dtype, device)
        v = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).to(device)
        cases += [(x, dy, v.to(v_dtype), offsets) for v_dtype in dict.fromkeys((torch.float32, dtype))]
    return cases


def compile_cases() -> Iterator[CompileCase]:
    """Every configuration above, for every pair of element types."""
    sizes = dict.fromkeys(("rows", "inputs", "outputs", "share", "x_stride", "dy_stride", "v_stride"), "i32")
    for dtype, aligned in product(DTYPES, (True, False)):
        for v_dtype in dict.fromkeys((dtype, torch.float32)):
            configuration, split, widened = shipped(dtype, v_dtype, aligned)
            types = {"x_ptr": POINTERS[dtype], "dy_ptr": POINTERS[dtype], "v_ptr": POINTERS[v_dtype]}
            types |= {"shares_ptr": "*fp32", **sizes}
            beside = "" if v_dtype == dtype else " beside float32"
            name = f"ghost_dot{beside} {name_of(dtype, aligned)}"
            constants = {"SPLIT_V": split, "WIDEN": widened}
            matrix = dtype != torch.float32 and not widened
            yield CompileCase(name, dot_kernel, configuration, types, constants, matrix, aligned, ("rows",))
