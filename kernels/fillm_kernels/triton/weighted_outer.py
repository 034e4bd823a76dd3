"""Triton kernel of `weighted_outer_`: a tile of out stays with one program from the first row to the last.

Weights are applied to sums, not to rows: a sample's products are added up from unrounded bfloat16 or float16 rows on
the matrix units, and the sum is weighted in float32 where the sample ends. Rounding w_b dy_t to the rows' type would
lose most of its digits; widening the rows would leave the matrix units. Where tiles are few, the rows are dealt out to
groups of programs: each group has a sum of its own, weighted where the group ends, and the sums are added in order. How
many there are depends on sizes alone, so no order is left to chance.
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
from fillm_kernels.triton.tiles import add_in_order, multiply, ragged_case, to_device, unit_rows

# untimed; chosen by `python -m fillm_kernels.compile_check`, bfloat16, registers / KiB of shared memory, no spill:
#              sm_80       sm_90       sm_100      gfx942
#   HALF       246 / 32    180 / 64    190 / 64    222 / 32    weighted; plain 182, 182, 212, 172 registers
#   ODD        114 / 16    106 / 16     86 / 16     68 / 16    at odd widths and strides HALF spills (103 on sm_90)
# `out` with a stride of 1 along its rows matters: 64 entries a thread with an address each spilled on sm_80 and sm_100.
HALF = Configuration({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_K": 64, "GROUP": 8}, num_warps=8, num_stages=3)
ODD = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 32, "GROUP": 8}, num_warps=8, num_stages=2)
FLOAT = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 16, "GROUP": 8}, num_warps=8, num_stages=2)
ENOUGH_PROGRAMS = 132  # one for every multiprocessor of the largest GPUs
FEWEST_STEPS = 8  # of a group, beside which writing and adding up its sum is little


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
    share,
    inputs,
    outputs,
    x_stride,
    dy_stride,
    out_row_stride,
    out_column_stride,
    group_stride,
    alpha,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of out, `share` of the steps: out += alpha * sum over samples of weight * dy_b^T x_b."""
    down, across = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    part = tl.program_id(0) // (down * across)
    tile = tl.program_id(0) % (down * across)
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tile % (GROUP * across)
    output = (group * GROUP + within % height) * BLOCK_O + tl.arange(0, BLOCK_O)
    feature = (within // height) * BLOCK_I + tl.arange(0, BLOCK_I)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    sample_total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    steps_ptr += part * share * 3
    for step in range(0, tl.minimum(share, steps - part * share)):
        begin, end = tl.load(steps_ptr + step * 3), tl.load(steps_ptr + step * 3 + 1)
        rows = begin + tl.arange(0, BLOCK_K)
        inside = (rows < end)[:, None]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + output, mask=inside & (output < outputs)[None, :], other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + feature, mask=inside & (feature < inputs)[None, :], other=0.0)
        sample_total = multiply(tl.trans(dy), x, sample_total, WIDEN)
        if WEIGHTED:
            sample = tl.load(steps_ptr + step * 3 + 2)
            if sample >= 0:  # the sample ends here, or the share does
                total += sample_total * tl.load(weights_ptr + sample)
                sample_total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    if not WEIGHTED:
        total = sample_total
    entries = out_ptr + part.to(tl.int64) * group_stride + output.to(tl.int64)[:, None] * out_row_stride
    entries += feature.to(tl.int64)[None, :] * out_column_stride
    kept = (output < outputs)[:, None] & (feature < inputs)[None, :]
    tl.store(entries, tl.load(entries, mask=kept, other=0.0) + alpha * total, mask=kept)


@lru_cache(maxsize=16)  # the layers of one batch ask with the same offsets
def plan(bounds: tuple[int, ...], block: int, tiles: int) -> tuple[Tensor, int]:
    """Runs of at most `block` rows of one sample, and how many of them a program takes where `out` has `tiles` tiles.

    Returns:
        [steps, 3], first row, end, the sample if it or a program's share ends here, else -1; steps of a share.
    """
    runs = []
    for sample, (begin, end) in enumerate(pairwise(bounds)):
        first = torch.arange(begin, end, block)
        runs.append(torch.stack([first, (first + block).clamp(max=end), torch.full_like(first, sample)], 1))
    steps = torch.cat(runs) if runs else torch.empty(0, 3, dtype=torch.int64)
    share = max(1, triton.cdiv(len(steps), max(1, min(ENOUGH_PROGRAMS // tiles, len(steps) // FEWEST_STEPS))))
    goes_on = steps[:-1, 2] == steps[1:, 2]
    goes_on[share - 1 :: share] = False
    steps[:-1, 2][goes_on] = -1
    return steps, share


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
    tiles = triton.cdiv(outputs, configuration.constants["BLOCK_O"])
    tiles *= triton.cdiv(inputs, configuration.constants["BLOCK_I"])
    steps, share = plan(bounds, configuration.constants["BLOCK_K"], tiles)
    groups, steps = triton.cdiv(len(steps), share), to_device(steps, x.device)
    sums = out if groups <= 1 else out.new_zeros(groups, outputs, inputs)
    # Without weights nothing is read through the pointer; `steps` stands in for them.
    factors = steps if weights is None else weights.to(torch.float32).contiguous()
    group_stride = 0 if sums is out else outputs * inputs
    sizes = (len(steps), share, inputs, outputs, x.stride(0), dy.stride(0), *sums.stride()[-2:], group_stride, alpha)
    constants = {"WEIGHTED": weights is not None, "WIDEN": widen()}
    launch_kernel(outer_kernel, tiles * groups, configuration, sums, x, dy, factors, steps, *sizes, **constants)
    if sums is not out:
        add_in_order(out, sums)


def small_case(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor | float | None, ...]]:
    """More than one tile, samples cut between groups, aligned widths and others, for the check at first use."""
    cases = []
    for inputs, outputs in ((144, 48), (136, 40)):
        x, dy, offsets = ragged_case([5, 0, 1100, 1], inputs, outputs, dtype, device)
        for weights in (torch.tensor([0.3, 1.0, -1.7, 2.0], device=device), None):
            cases.append((torch.ones(outputs, inputs, device=device), x, dy, weights, offsets, 0.5))
    return cases


def compile_cases() -> Iterator[CompileCase]:
    """Every configuration above, with weights and without."""
    for dtype, aligned, weighted in product(DTYPES, (True, False), (True, False)):
        types = {"out_ptr": "*fp32", "x_ptr": POINTERS[dtype], "dy_ptr": POINTERS[dtype]}
        types |= {"weights_ptr": "*fp32" if weighted else "*i64", "steps_ptr": "*i64"}
        types |= {"steps": "i32", "share": "i32"}
        strides = ("x_stride", "dy_stride", "out_row_stride", "group_stride")
        types |= {**dict.fromkeys(("inputs", "outputs", *strides), "i32"), "alpha": "fp32"}
        constants = {"WEIGHTED": weighted, "WIDEN": False}
        if aligned:
            constants["out_column_stride"] = 1  # Triton makes a constant of an argument that is one
        else:
            types["out_column_stride"] = "i32"
        name = f"weighted_outer_ {'weighted' if weighted else 'plain'} {name_of(dtype, aligned)}"
        half, counts = dtype != torch.float32, ("steps", "share")
        yield CompileCase(name, outer_kernel, shipped(dtype, aligned), types, constants, half, aligned, counts)
