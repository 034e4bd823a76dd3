"""Triton kernel of `sample_moments`: a tile of every sample's gradient passes through one program's registers.

A program owns a tile of [O, I] and goes through samples, one after another: a sample's tile is summed over its rows on
the matrix units, and where the sample ends, everything that is asked is taken from it before the next one starts.
Sums over samples stay in registers and are written once; a number per sample and tile goes to a table that is added up
in fixed order; entries go to their bins of a sketch as integers (outer_sketch.py). Short samples therefore share a
program, and no entry of any G_b is ever written.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise, product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.sample_moments import Sketching, sketch_formed
from fillm_kernels.seed_law import BlockMap
from fillm_kernels.sketch import DENSE
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
from fillm_kernels.triton.outer_sketch import add_tile, sketch_target, tile_places
from fillm_kernels.triton.sketch import launch as launch_sketch
from fillm_kernels.triton.tiles import multiply, ragged_case, to_device, unit_rows

# untimed; chosen by `python -m fillm_kernels.compile_check`, most registers / KiB of shared memory, no spill:
#                 sm_80       sm_90       sm_100      gfx942
#   HALF          240 / 32    238 / 32    216 / 25    172 / 32    64 rows at a time spilled on sm_80 (2)
#   HALF_SKETCH   153 / 20    139 / 48    201 / 48    188 / 40    with all matrices beside it spilled on gfx942 (6)
#   ODD           202 / 16    182 / 16    180 / 16    126 / 16    with a sketch and all matrices SKETCHED_ODD
#   FLOAT         158 / 16     94 / 16     84 / 16     90 / 16
#   FLOAT_FULL    182 / 16    182 / 16    184 / 16    126 / 16    two stages spilled on sm_80 (20) and sm_90 (2)
# 32 rows at a time, the length of two matrix instructions: of 64 a sample of 28 tokens would leave over half empty.
HALF = Configuration({"BLOCK_O": 128, "BLOCK_I": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3)
ODD = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 32}, num_warps=8, num_stages=2)
FLOAT = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 16}, num_warps=8, num_stages=2)
# With v, second and absolute three tiles beside G_b's are held in registers; with a sketch the places of entries too.
FLOAT_FULL = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 16}, num_warps=8, num_stages=1)
HALF_SKETCH = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3)
# Programs below which samples are dealt out to several groups, where nothing is summed over samples: some for each of
# the multiprocessors of the largest GPUs.
ENOUGH_PROGRAMS = 1024
FEWEST_SAMPLES = 8  # of a group that are sketched, since every program hashes its tile
NO_SKETCH = {"SKETCH": False, "KIND": 0}


def shipped(dtype: torch.dtype, aligned: bool, full: bool, sketched: bool) -> Configuration:
    """The configuration for an element type; `full` where v, second and absolute are all given."""
    if dtype == torch.float32:
        return FLOAT_FULL if full else FLOAT
    if not aligned or (full and sketched):
        return ODD
    return HALF_SKETCH if sketched else HALF


@triton.jit
def moments_kernel(
    x_ptr,
    dy_ptr,
    v_ptr,
    second_ptr,
    absolute_ptr,
    norms_ptr,
    dots_ptr,
    row_norms_ptr,
    steps_ptr,
    groups_ptr,
    tiles,
    inputs,
    outputs,
    x_stride,
    dy_stride,
    v_stride,
    second_stride,
    absolute_stride,
    alpha,
    bins_ptr,
    up_ptr,
    seed_low,
    seed_high,
    dim,
    width,
    ranges,
    groups,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    SECOND: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    SKETCH: tl.constexpr,
    KIND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of [O, I], all samples of one group; one map of a sketch, those behind the first for nothing else."""
    across = tl.cdiv(inputs, BLOCK_I)
    tile = tl.program_id(0) % tiles
    group = (tl.program_id(0) // tiles) % groups
    chunk = tl.program_id(0) // tiles // groups if SKETCH else 0
    output = (tile // across) * BLOCK_O + tl.arange(0, BLOCK_O)
    feature = (tile % across) * BLOCK_I + tl.arange(0, BLOCK_I)
    kept = (output < outputs)[:, None] & (feature < inputs)[None, :]
    far = output.to(tl.int64)[:, None]
    near = feature.to(tl.int64)[None, :]
    if DOT:
        v = tl.load(v_ptr + far * v_stride + near, mask=kept, other=0.0).to(tl.float32)
    if SKETCH:
        places = tile_places(output, feature, inputs, seed_low, seed_high, width, ranges, chunk, KIND)
    gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    absolute = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for step in range(tl.load(groups_ptr + group), tl.load(groups_ptr + group + 1)):
        begin, end = tl.load(steps_ptr + step * 3), tl.load(steps_ptr + step * 3 + 1)
        rows = begin + tl.arange(0, BLOCK_K)
        inside = (rows < end)[:, None]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + output, mask=inside & (output < outputs)[None, :], other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + feature, mask=inside & (feature < inputs)[None, :], other=0.0)
        gradient = multiply(tl.trans(dy), x, gradient, WIDEN)
        sample = tl.load(steps_ptr + step * 3 + 2)
        if sample >= 0:  # the sample ends here, and its tile of G_b is whole
            if chunk == 0:
                squares = gradient * gradient
                tl.store(norms_ptr + sample * tiles + tile, tl.sum(squares))
                if ROWS:
                    place = row_norms_ptr + (sample * outputs + output) * across + tile % across
                    tl.store(place, tl.sum(squares, 1), mask=output < outputs)
                if DOT:
                    tl.store(dots_ptr + sample * tiles + tile, tl.sum(gradient * v))
                if SECOND:
                    second += squares
                if ABSOLUTE:
                    absolute += tl.abs(gradient)
            if SKETCH:
                bins = bins_ptr + sample * dim + chunk * (width * ranges)
                add_tile(bins, places, gradient, tl.load(up_ptr + sample), kept)
            gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    if SECOND and chunk == 0:
        entries = second_ptr + far * second_stride + near
        tl.store(entries, tl.load(entries, mask=kept, other=0.0) + alpha * second, mask=kept)
    if ABSOLUTE and chunk == 0:
        entries = absolute_ptr + far * absolute_stride + near
        tl.store(entries, tl.load(entries, mask=kept, other=0.0) + alpha * absolute, mask=kept)


@lru_cache(maxsize=16)  # the layers of one batch ask with the same offsets
def plan(bounds: tuple[int, ...], block: int, groups: int) -> tuple[Tensor, Tensor]:
    """Steps of at most `block` rows of one sample, and how they are dealt out.

    Returns:
        [steps, 3], first row, end, the sample if it ends here, else -1 (an empty sample has one step of no rows);
        [groups + 1], the first step of every group, each of which begins with a sample.
    """
    steps, firsts = [], []
    for sample, (begin, end) in enumerate(pairwise(bounds)):
        firsts.append(len(steps))
        for first in range(begin, max(end, begin + 1), block):
            steps.append((first, min(first + block, end), sample if first + block >= end else -1))
    firsts.append(len(steps))
    shares = [len(steps) * group // groups for group in range(groups + 1)]
    starts = [min(firsts, key=lambda step, share=share: (abs(step - share), step)) for share in shares]
    return torch.tensor(steps, dtype=torch.int64).reshape(-1, 3), torch.tensor(starts, dtype=torch.int64)


def launch(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    v: Tensor | None,
    second: Tensor | None,
    absolute: Tensor | None,
    rows: bool,
    alpha: float,
    sketching: Sketching | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N, I], [N, O], [B + 1] on the host -> norms [B], dots [B] or [0], row norms [B, O] or [0, 0], float64; sketches.

    Sketches [B, dim] or [0, 0]; of the dense kinds, whose entries all reach all bins, blocks of rows of the gradients
    are formed by torch's products and sketched by the kernel of `sketch`.
    """
    samples, inputs, outputs = offsets.shape[0] - 1, x.shape[1], dy.shape[1]
    empty = x.new_zeros(samples, dtype=torch.float64)
    sketches = empty.new_zeros((samples, sketching.dim) if sketching else (0, 0))
    if x.numel() == 0 or dy.numel() == 0:
        shape = (samples, outputs) if rows else (0, 0)
        return empty, empty.clone() if v is not None else empty[:0], empty.new_zeros(shape), sketches
    x, dy = unit_rows(x), unit_rows(dy)
    target = None
    if sketching and sketching.kind in DENSE:
        sketches = sketch_formed(x, dy, offsets, sketching, launch_sketch)
    elif sketching:
        law = BlockMap.of(sketching.kind, sketching.seed, sketching.dim, sketching.nonzeros)
        target = sketch_target(x, dy, offsets, law)
    v = None if v is None else unit_rows(v)
    # Written along rows; what lies otherwise is summed apart and added.
    targets = [
        out if out is None or out.stride(1) == 1 else torch.zeros_like(out).contiguous() for out in (second, absolute)
    ]
    given = [matrix for matrix in (v, *targets) if matrix is not None]
    configuration = shipped(x.dtype, is_aligned((x, dy, *given)), len(given) == 3, target is not None)
    down = triton.cdiv(outputs, configuration.constants["BLOCK_O"])
    across = triton.cdiv(inputs, configuration.constants["BLOCK_I"])
    tiles = down * across
    summed = second is not None or absolute is not None
    most = samples // FEWEST_SAMPLES if target else samples
    groups = 1 if summed else max(1, min(most, ENOUGH_PROGRAMS // tiles))
    steps, starts = (
        to_device(part, x.device) for part in plan(tuple(offsets.tolist()), configuration.constants["BLOCK_K"], groups)
    )
    table = torch.empty(samples, tiles, dtype=torch.float32, device=x.device)
    norms, dots = table, torch.empty_like(table) if v is not None else table
    row_norms = x.new_empty((samples, outputs, across) if rows else (0, outputs, across), dtype=torch.float32)
    # What is not asked is neither read nor written; any pointer stands in for it.
    matrices = [table if matrix is None else matrix for matrix in (v, *targets)]
    sketched = target.arguments() if target else (steps, table, 0, 0, 1, 1, 1)
    maps = target.law.chunks if target else 1
    launch_kernel(
        moments_kernel, tiles * groups * maps, configuration, x, dy, *matrices, norms, dots, row_norms, steps, starts,
        tiles, inputs, outputs, x.stride(0), dy.stride(0), *(matrix.stride(0) for matrix in matrices), alpha, *sketched,
        groups,
        DOT=v is not None, SECOND=second is not None, ABSOLUTE=absolute is not None, ROWS=rows,
        **(target.constants() if target else NO_SKETCH), WIDEN=widen(),
    )  # fmt: skip
    for out, summed_apart in zip((second, absolute), targets, strict=True):
        if out is not None and summed_apart is not out:
            out.add_(summed_apart)
    return (
        norms.sum(1, dtype=torch.float64),
        dots.sum(1, dtype=torch.float64) if v is not None else empty[:0],
        row_norms.sum(2, dtype=torch.float64) if rows else empty.new_zeros(0, 0),
        target.result() if target else sketches,
    )


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    """More than one tile, several samples and everything asked, for the check at first use."""
    x, dy, offsets = ragged_case([5, 0, 70, 1], 136, 40, dtype, device)
    generator = torch.Generator().manual_seed(1)
    v, second, absolute = (torch.rand(40, 136, generator=generator).to(device) for _ in range(3))
    return x, dy, offsets, v, second, absolute, True, 0.5, Sketching(24, "oporp", 3, 4)


def compile_cases() -> Iterator[CompileCase]:
    """Every configuration above: the norm alone, with each other result, and with all."""
    asked = {
        "norm": (False, False, False, False, NO_SKETCH),
        "dot": (True, False, False, False, NO_SKETCH),
        "second": (False, True, False, False, NO_SKETCH),
        "dot second absolute": (True, True, True, False, NO_SKETCH),
        "all but sketch": (True, True, True, True, NO_SKETCH),
        "sketch": (False, False, False, False, {"SKETCH": True, "KIND": 0}),
        "all, sjlt": (True, True, True, True, {"SKETCH": True, "KIND": 2}),
    }
    sizes = ("inputs", "outputs", "x_stride", "dy_stride", "v_stride", "second_stride", "absolute_stride")
    counts = ("tiles", "seed_low", "seed_high", "dim", "width", "ranges", "groups")
    for dtype, aligned, name in product(DTYPES, (True, False), asked):
        types = {"x_ptr": POINTERS[dtype], "dy_ptr": POINTERS[dtype]}
        types |= {f"{part}_ptr": "*fp32" for part in ("v", "second", "absolute", "norms", "dots", "row_norms", "up")}
        types |= {"steps_ptr": "*i64", "groups_ptr": "*i64", "bins_ptr": "*i64", **dict.fromkeys(sizes, "i32")}
        types |= {"alpha": "fp32", **dict.fromkeys(counts, "i32")}
        *flags, sketch = asked[name]
        constants = {**dict(zip(("DOT", "SECOND", "ABSOLUTE", "ROWS"), flags, strict=True)), **sketch, "WIDEN": False}
        configuration = shipped(dtype, aligned, constants["ABSOLUTE"], constants["SKETCH"])
        case = f"sample_moments {name} {name_of(dtype, aligned)}"
        yield CompileCase(
            case, moments_kernel, configuration, types, constants, dtype != torch.float32, aligned, counts
        )  # fmt: skip
