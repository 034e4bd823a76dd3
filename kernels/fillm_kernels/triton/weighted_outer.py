"""Triton kernel of `weighted_outer_`: a tile of out stays with one program from the first row to the last.

Weights are applied to sums, not to rows: a sample's products are added up from unrounded bfloat16 or float16 rows on
the matrix units, and the sum is weighted in float32 where the sample ends. Rounding w_b dy_t to the rows' type would
lose most of its digits; widening the rows would leave the matrix units. One program owns each entry, so no order is
left to chance.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise, product

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
from fillm_kernels.triton.tiles import multiply, ragged_case, to_device, unit_rows

# untimed; chosen by `python -m fillm_kernels.compile_check`, bfloat16, registers / KiB of shared memory, no spill:
#              sm_80       sm_90       sm_100      gfx942
#   HALF       250 / 32    180 / 64    190 / 64    222 / 32    weighted; plain 182, 182, 212, 170 registers
#   ODD        110 / 16     78 / 16     96 / 16     68 / 16    at odd widths and strides HALF spills (103 on sm_90)
# `out` with a stride of 1 along its rows matters: 64 entries a thread with an address each spilled on sm_80 and sm_100.
HALF = Configuration({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3)
ODD = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=2)
FLOAT = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 16, "GROUP": 8}, num_warps=8, num_stages=2)


def shipped(dtype: torch.dtype, aligned: bool) -> Configuration:
    """The configuration for an element type."""
    return FLOAT if dtype == torch.float32 else HALF if aligned else ODD


@triton.jit
def outer_kernel(
    out_ptr,
    x_ptr,
    dy_ptr,
    weights_ptr,
    steps_ptr,
    steps,
    inputs,
    outputs,
    x_stride,
    dy_stride,
    out_row_stride,
    out_column_stride,
    alpha,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of out: out += alpha * sum over samples of weight * dy_b^T x_b."""
    down, across = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    output = (group * GROUP + within % height) * BLOCK_O + tl.arange(0, BLOCK_O)
    feature = (within // height) * BLOCK_I + tl.arange(0, BLOCK_I)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    sample_total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for step in range(0, steps):
        begin, end = tl.load(steps_ptr + step * 3), tl.load(steps_ptr + step * 3 + 1)
        rows = begin + tl.arange(0, BLOCK_K)
        inside = (rows < end)[:, None]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + output, mask=inside & (output < outputs)[None, :], other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + feature, mask=inside & (feature < inputs)[None, :], other=0.0)
        sample_total = multiply(tl.trans(dy), x, sample_total, WIDEN)
        if WEIGHTED:
            sample = tl.load(steps_ptr + step * 3 + 2)
            if sample >= 0:  # the sample ends here
                total += sample_total * tl.load(weights_ptr + sample)
                sample_total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    if not WEIGHTED:
        total = sample_total
    entries = out_ptr + output.to(tl.int64)[:, None] * out_row_stride
    entries += feature.to(tl.int64)[None, :] * out_column_stride
    kept = (output < outputs)[:, None] & (feature < inputs)[None, :]
    tl.store(entries, tl.load(entries, mask=kept, other=0.0) + alpha * total, mask=kept)


@lru_cache(maxsize=16)  # the layers of one batch ask with the same offsets
def plan(bounds: tuple[int, ...], block: int) -> Tensor:
    """Runs of at most `block` rows of one sample: [steps, 3], first row, end, the sample if it ends here, else -1."""
    steps = []
    for sample, (begin, end) in enumerate(pairwise(bounds)):
        first = torch.arange(begin, end, block)
        last = torch.full_like(first, -1)
        last[-1:] = sample
        steps.append(torch.stack([first, (first + block).clamp(max=end), last], 1))
    return torch.cat(steps) if steps else torch.empty(0, 3, dtype=torch.int64)


def launch(out: Tensor, x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor, alpha: float) -> None:
    """Add to out [O, I], any strides: x [N, I], dy [N, O], weights [B] or None, offsets [B + 1] on the host."""
    inputs, outputs = x.shape[1], dy.shape[1]
    if x.numel() == 0 or dy.numel() == 0:
        return
    if out.stride(1) != 1 and out.stride(0) == 1:  # a transposed accumulator: add the transposed products to its rows
        return launch(out.T, dy, x, weights, offsets, alpha)
    x, dy = unit_rows(x), unit_rows(dy)
    aligned = out.stride(1) == 1 and is_aligned((x, dy, out))
    configuration = shipped(x.dtype, aligned)
    bounds = tuple(offsets.tolist()) if weights is not None else (0, x.shape[0])
    steps = to_device(plan(bounds, configuration.constants["BLOCK_K"]), x.device)
    # Without weights nothing is read through the pointer; `steps` stands in for them.
    factors = steps if weights is None else weights.to(torch.float32).contiguous()
    programs = triton.cdiv(outputs, configuration.constants["BLOCK_O"])
    programs *= triton.cdiv(inputs, configuration.constants["BLOCK_I"])
    sizes = (len(steps), inputs, outputs, x.stride(0), dy.stride(0), *out.stride(), alpha)
    constants = {"WEIGHTED": weights is not None, "WIDEN": widen()}
    launch_kernel(outer_kernel, programs, configuration, out, x, dy, factors, steps, *sizes, **constants)


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """More than one tile and several samples, for the check at first use."""
    x, dy, offsets = ragged_case([5, 0, 70, 1], 136, 40, dtype, device)
    weights = torch.tensor([0.3, 1.0, -1.7, 2.0], device=device)
    return torch.ones(40, 136, device=device), x, dy, weights, offsets, 0.5


def compile_cases() -> Iterator[CompileCase]:
    """Every configuration above, with weights and without."""
    for dtype, aligned, weighted in product(DTYPES, (True, False), (True, False)):
        types = {"out_ptr": "*fp32", "x_ptr": POINTERS[dtype], "dy_ptr": POINTERS[dtype]}
        types |= {"weights_ptr": "*fp32" if weighted else "*i64", "steps_ptr": "*i64", "steps": "i32"}
        strides = ("x_stride", "dy_stride", "out_row_stride")
        types |= {**dict.fromkeys(("inputs", "outputs", *strides), "i32"), "alpha": "fp32"}
        constants = {"WEIGHTED": weighted, "WIDEN": False}
        if aligned:
            constants["out_column_stride"] = 1  # Triton makes a constant of an argument that is one
        else:
            types["out_column_stride"] = "i32"
        name = f"weighted_outer_ {'weighted' if weighted else 'plain'} {name_of(dtype, aligned)}"
        half = dtype != torch.float32
        yield CompileCase(name, outer_kernel, shipped(dtype, aligned), types, constants, half, aligned, ("steps",))
