"""Pieces of kernels that several ops share: products of rows, and sums of segments in a fixed order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.triton.configurations import POINTERS, CompileCase, Configuration, launch_kernel, name_of

# untimed; sums of a few megabytes at most, no matrix units. sm_90: at most 48 registers, no spill.
ALONG = Configuration({"BLOCK_ROWS": 1024, "BLOCK_COLUMNS": 1}, num_warps=4, num_stages=1)
ACROSS = Configuration({"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 32}, num_warps=4, num_stages=1)


@triton.jit
def multiply(a, b, total, WIDEN: tl.constexpr):
    """Return total + a b in float32: a [M, K], b [K, N], total [M, N]; float32 operands as IEEE float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def cut(values, dtype: tl.constexpr):
    """Three numbers of 8 bits, bfloat16, for every float32 number of 24: they add up to it; any shape."""
    high = values.to(dtype)
    rest = values - high.to(tl.float32)
    middle = rest.to(dtype)
    return high, middle, (rest - middle.to(tl.float32)).to(dtype)


@triton.jit
def row_products(pointer, rows, stride, width, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr):
    """Inner products of rows of one matrix with each other, every row loaded once: rows [BLOCK_T], int64 -> square."""
    entries = pointer + rows[:, None] * stride
    total = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for begin in range(0, width, BLOCK_K):
        features = begin + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(entries + features, mask=features < width, other=0.0)
        total = multiply(a, tl.trans(a), total, WIDEN)
    return total


@triton.jit
def cross_products(
    first_pointer,
    second_pointer,
    left,
    right,
    first_stride,
    second_stride,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Inner products of rows of two matrices of equal width: rows [BLOCK_T], int64 -> [BLOCK_T, BLOCK_T], float32."""
    first_rows = first_pointer + left[:, None] * first_stride
    second_rows = second_pointer + right[:, None] * second_stride
    total = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for begin in range(0, width, BLOCK_K):
        features = begin + tl.arange(0, BLOCK_K)[None, :]
        inside = features < width
        a = tl.load(first_rows + features, mask=inside, other=0.0)
        b = tl.load(second_rows + features, mask=inside, other=0.0)
        total = multiply(a, tl.trans(b), total, WIDEN)
    return total


@triton.jit
def sum_segments_kernel(
    values_ptr, bounds_ptr, sums_ptr, columns, blocks, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Sums over runs of rows: values [P, columns], bounds [B + 1] -> sums [B, columns], float64."""
    program = tl.program_id(0).to(tl.int64)
    segment, block = program // blocks, program % blocks
    begin, end = tl.load(bounds_ptr + segment), tl.load(bounds_ptr + segment + 1)
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float64)
    for first in range(begin, end, BLOCK_ROWS):
        rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_ROWS)
        inside = (rows < end)[:, None] & (column < columns)[None, :]
        total += tl.load(values_ptr + rows[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float64)
    tl.store(sums_ptr + segment * columns + column, tl.sum(total, 0), mask=column < columns)


def sum_segments(values: Tensor, bounds: Tensor) -> Tensor:
    """Sums over runs of rows, in an order that depends on sizes alone.

    Args:
        values: [P, W], contiguous, float32 | float64.
        bounds: first row of each run and P at the end, [B + 1], int64, on the same device.

    Returns:
        [B, W], float64.
    """
    segments, columns = bounds.shape[0] - 1, values.shape[1]
    sums = torch.empty(segments, columns, dtype=torch.float64, device=values.device)
    configuration = ALONG if columns == 1 else ACROSS
    blocks = triton.cdiv(columns, configuration.constants["BLOCK_COLUMNS"])
    launch_kernel(sum_segments_kernel, segments * blocks, configuration, values, bounds, sums, columns, blocks)
    return sums


def add_in_order(out: Tensor, matrices: Tensor) -> None:
    """Add [G, O, I] to out [O, I], any strides: summed first to last in float64, rounded once."""
    flat = matrices.flatten(1)
    out += sum_segments(flat, torch.tensor([0, len(flat)], device=flat.device))[0].view_as(out).to(out.dtype)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A small host table on the device, without waiting for work that is under way there."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def tables_to_device(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Host tables of int64 on the device by one copy: for small layers a copy each would take as long as the kernel.

    Each begins at a multiple of 16 bytes, as a tensor of its own would.
    """
    padded = [torch.nn.functional.pad(table.flatten(), (0, table.numel() % 2)) for table in tables]
    parts = to_device(torch.cat(padded), device).split([len(part) for part in padded])
    return [part[: table.numel()].view(table.shape) for part, table in zip(parts, tables, strict=True)]


def unit_rows(matrix: Tensor) -> Tensor:
    """The matrix itself if entries of a row lie side by side, else a copy in which they do."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def ragged_case(
    lengths: Sequence[int], inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x [N, I] and dy [N, O] on the device and offsets [B + 1] on the host, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(sum(lengths), width, generator=generator) for width in (inputs, outputs))
    return x.to(device, dtype), dy.to(device, dtype), torch.tensor([0, *lengths]).cumsum(0)


def compile_cases() -> list[CompileCase]:
    """Both ways of summing segments, for both types they are called with."""
    cases = []
    for name, configuration in (("along", ALONG), ("across", ACROSS)):
        for dtype in (torch.float32, torch.float64):
            types = {
                "values_ptr": POINTERS[dtype],
                "bounds_ptr": "*i64",
                "sums_ptr": "*fp64",
                "columns": "i32",
                "blocks": "i32",
            }
            label = f"sum_segments {name} {name_of(dtype)}"
            cases.append(CompileCase(label, sum_segments_kernel, configuration, types, aligned=False))
    return cases
