"""Triton kernel of `sample_moments`: a tile of every sample's gradient passes through one program's registers.

A program owns a tile of [O, I] and goes through samples, one after another: a sample's tile is summed over its rows on
the matrix units, and where the sample ends, everything that is asked is taken from it before the next one starts.
Sums over samples stay in registers and are written once; a number per sample and tile goes to a table that is added up
in fixed order; entries go to their bins of a sketch as integers (outer_sketch.py). Short samples therefore share a
program, and no entry of any G_b is ever written, but for the parts of long samples of small layers (steps.py).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

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
from fillm_kernels.triton.outer_sketch import SketchTarget, add_tile, sketch_target, tile_places
from fillm_kernels.triton.sketch import launch as launch_sketch
from fillm_kernels.triton.steps import FEW_TILES, plan, plan_parts
from fillm_kernels.triton.tiles import add_in_order, multiply, ragged_case, to_device, unit_rows

# untimed; chosen by `python -m fillm_kernels.compile_check`, most registers / KiB of shared memory; no spill, nor with
# Triton 3.6 on sm_90:
#                 sm_80       sm_90       sm_100      gfx942
#   HALF          242 / 32    240 / 32    210 / 24    172 / 32    64 rows at a time spilled on sm_80 (2)
#   HALF_SKETCH   153 / 20    139 / 48    201 / 48    188 / 40
#   HALF_ALL      180 / 16    146 / 16    184 / 16    212 / 16    two stages spilled on gfx942 (2)
#   ODD           202 / 16    188 / 16    180 / 16    126 / 16
#     sketching   171 / 16    160 / 32    160 / 32    151 / 32
#   FLOAT         158 / 16     94 / 16     94 / 16     90 / 16
#     sketching   224 / 40    186 / 40    188 / 40    186 / 40
#   FLOAT_FULL     94 / 6      93 / 6      94 / 6     120 / 8     64 columns spilled with Triton 3.6 on sm_90 (2)
#   FLOAT_ALL     102 / 8     101 / 8     101 / 8     191 / 8     64 rows of G_b spilled on sm_90 (6)
# 32 rows at a time, the length of two matrix instructions: of 64 a sample of 28 tokens would leave over half empty.
HALF = Configuration({"BLOCK_O": 128, "BLOCK_I": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3)
ODD = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 32}, num_warps=8, num_stages=2)
FLOAT = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 16}, num_warps=8, num_stages=2)
# With v, second and absolute three tiles beside G_b's are held in registers; with a sketch the places of entries too.
FLOAT_FULL = Configuration({"BLOCK_O": 64, "BLOCK_I": 32, "BLOCK_K": 16}, num_warps=8, num_stages=1)
HALF_SKETCH = Configuration({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3)
HALF_ALL = Configuration({"BLOCK_O": 64, "BLOCK_I": 32, "BLOCK_K": 32}, num_warps=8, num_stages=1)
FLOAT_ALL = Configuration({"BLOCK_O": 32, "BLOCK_I": 32, "BLOCK_K": 16}, num_warps=8, num_stages=1)
# Programs below which samples are dealt out to several groups: some for every multiprocessor of the largest GPUs.
ENOUGH_PROGRAMS = 1024
FEWEST_SAMPLES = 8  # of a group that are sketched, since every program hashes its tile
NO_SKETCH = {"SKETCH": False, "KIND": 0}


def shipped(dtype: torch.dtype, aligned: bool, full: bool, sketched: bool) -> Configuration:
    """The configuration for an element type; `full` where v, second and absolute are all given."""
    if full and sketched:
        return FLOAT_ALL if dtype == torch.float32 else HALF_ALL
    if dtype == torch.float32:
        return FLOAT_FULL if full else FLOAT
    if not aligned:
        return ODD
    return HALF_SKETCH if sketched else HALF


@triton.jit
def add_rows(
    gradient, x_ptr, dy_ptr, begin, end, feature, output, inputs, outputs, x_stride, dy_stride, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of G_b, [O, I] float32, with the products of rows begin .. end (BLOCK_K at most, int64) added."""
    rows = begin + tl.arange(0, BLOCK_K)
    inside = (rows < end)[:, None]
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride + output, mask=inside & (output < outputs)[None, :], other=0.0)
    x = tl.load(x_ptr + rows[:, None] * x_stride + feature, mask=inside & (feature < inputs)[None, :], other=0.0)
    return multiply(tl.trans(dy), x, gradient, WIDEN)


@triton.jit
def part_kernel(
    x_ptr, dy_ptr, parts_ptr, steps_ptr, tiles, inputs, outputs, x_stride, dy_stride,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of [O, I], one part of the rows of a long sample: parts [parts, O, I], float32."""
    across = tl.cdiv(inputs, BLOCK_I)
    tile = tl.program_id(0) % tiles
    part = (tl.program_id(0) // tiles).to(tl.int64)
    output = (tile // across) * BLOCK_O + tl.arange(0, BLOCK_O)
    feature = (tile % across) * BLOCK_I + tl.arange(0, BLOCK_I)
    gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    end = tl.load(steps_ptr + part * 3 + 1)
    for begin in range(tl.load(steps_ptr + part * 3), end, BLOCK_K):
        gradient = add_rows(
            gradient, x_ptr, dy_ptr, tl.cast(begin, tl.int64), end, feature, output, inputs, outputs, x_stride,
            dy_stride, BLOCK_K, WIDEN,
        )  # fmt: skip
    place = parts_ptr + (part * outputs + output[:, None]) * inputs + feature[None, :]
    tl.store(place, gradient, mask=(output < outputs)[:, None] & (feature < inputs)[None, :])


@triton.jit(do_not_specialize=["groups", "seed_low", "seed_high", "dim", "width", "ranges"])
def moments_kernel(
    x_ptr,
    dy_ptr,
    parts_ptr,
    v_ptr,
    second_ptr,
    absolute_ptr,
    norms_ptr,
    dots_ptr,
    row_norms_ptr,
    steps_ptr,
    groups_ptr,
    tiles,
    groups,
    inputs,
    outputs,
    x_stride,
    dy_stride,
    v_stride,
    second_stride,
    absolute_stride,
    group_stride,
    alpha,
    bins_ptr,
    up_ptr,
    seed_low,
    seed_high,
    dim,
    width,
    ranges,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    SECOND: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    SKETCH: tl.constexpr,
    KIND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of [O, I], all samples of one group; one map of a sketch, those behind the first for nothing else.

    PARTS says that a step is a part of a sample, already multiplied, instead of some of its rows.
    """
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
        if PARTS:
            gradient += tl.load(parts_ptr + (step * outputs + far) * inputs + near, mask=kept, other=0.0)
        else:
            gradient = add_rows(
                gradient, x_ptr, dy_ptr, tl.load(steps_ptr + step * 3), tl.load(steps_ptr + step * 3 + 1), feature,
                output, inputs, outputs, x_stride, dy_stride, BLOCK_K, WIDEN,
            )  # fmt: skip
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
        entries = second_ptr + group.to(tl.int64) * group_stride + far * second_stride + near
        tl.store(entries, tl.load(entries, mask=kept, other=0.0) + alpha * second, mask=kept)
    if ABSOLUTE and chunk == 0:
        entries = absolute_ptr + group.to(tl.int64) * group_stride + far * absolute_stride + near
        tl.store(entries, tl.load(entries, mask=kept, other=0.0) + alpha * absolute, mask=kept)


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
    given = [matrix for matrix in (v, second, absolute) if matrix is not None]
    full, sketched = len(given) == 3, target is not None
    configuration = shipped(x.dtype, is_aligned((x, dy, *given)), full, sketched)
    across = triton.cdiv(inputs, configuration.constants["BLOCK_I"])
    tiles = across * triton.cdiv(outputs, configuration.constants["BLOCK_O"])
    table = torch.empty(samples, tiles, dtype=torch.float32, device=x.device)
    dots = torch.empty_like(table) if v is not None else table
    row_norms = x.new_empty((samples, outputs, across) if rows else (0, outputs, across), dtype=torch.float32)
    visit = partial(
        _visit, x, dy, v, second, absolute, (table, dots, row_norms), target, alpha, configuration, tiles, rows
    )
    bounds = tuple(offsets.tolist())
    _visit_rows(visit, bounds, configuration, tiles, target is not None)
    for steps in plan_parts(bounds, tiles, inputs * outputs):
        _visit_parts(visit, x, dy, steps, configuration, tiles)
    return (
        table.sum(1, dtype=torch.float64),
        dots.sum(1, dtype=torch.float64) if v is not None else empty[:0],
        row_norms.sum(2, dtype=torch.float64) if rows else empty.new_zeros(0, 0),
        target.result() if target else sketches,
    )


def _visit_rows(
    visit: Callable[..., None], bounds: tuple[int, ...], configuration: Configuration, tiles: int, sketched: bool
) -> None:
    """The samples that are not cut: every program takes all rows of some of them."""
    samples = len(bounds) - 1
    most = samples // FEWEST_SAMPLES if sketched else samples
    groups = max(1, min(most, ENOUGH_PROGRAMS // tiles))
    visit(*plan(bounds, configuration.constants["BLOCK_K"], groups, tiles))


def _visit_parts(
    visit: Callable[..., None], x: Tensor, dy: Tensor, steps: Tensor, configuration: Configuration, tiles: int
) -> None:
    """Samples cut into parts, [parts, 3]: products of every part first, [parts, O, I], then the visit adds them up."""
    parts = torch.empty(len(steps), dy.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    launch_kernel(
        part_kernel, tiles * len(steps), configuration, x, dy, parts, to_device(steps, x.device), tiles, x.shape[1],
        dy.shape[1], x.stride(0), dy.stride(0), WIDEN=widen(),
    )  # fmt: skip
    visit(steps, torch.tensor([0, len(steps)]), parts)


def _visit(
    x: Tensor,
    dy: Tensor,
    v: Tensor | None,
    second: Tensor | None,
    absolute: Tensor | None,
    found: tuple[Tensor, Tensor, Tensor],
    target: SketchTarget | None,
    alpha: float,
    configuration: Configuration,
    tiles: int,
    rows: bool,
    steps: Tensor,
    starts: Tensor,
    parts: Tensor | None = None,
) -> None:
    """One launch of `moments_kernel`: steps [steps, 3] in groups [groups + 1], of rows or of parts [steps, O, I]."""
    groups = len(starts) - 1
    # Written along rows by one group; what lies otherwise, or comes from several groups, is summed apart and added.
    direct = groups == 1 and all(out is None or out.stride(1) == 1 for out in (second, absolute))
    targets = [
        out if out is None or direct else torch.zeros(groups, *out.shape, dtype=out.dtype, device=out.device)
        for out in (second, absolute)
    ]
    # What is not asked is neither read nor written; any pointer stands in for it.
    matrices = [found[0] if matrix is None else matrix for matrix in (v, *targets)]
    group_stride = 0 if direct else dy.shape[1] * x.shape[1]
    steps = to_device(steps, x.device)
    launch_kernel(
        moments_kernel, tiles * groups * (target.law.chunks if target else 1), configuration,
        x, dy, found[0] if parts is None else parts, *matrices, *found, steps, to_device(starts, x.device),
        tiles, groups, x.shape[1], dy.shape[1], x.stride(0), dy.stride(0), *(matrix.stride(-2) for matrix in matrices),
        group_stride, alpha, *(target.arguments() if target else (steps, found[0], 0, 0, 1, 1, 1)),
        PARTS=parts is not None, DOT=v is not None, SECOND=second is not None, ABSOLUTE=absolute is not None, ROWS=rows,
        **(target.constants() if target else NO_SKETCH), WIDEN=widen(),
    )  # fmt: skip
    for out, apart in zip((second, absolute), targets, strict=True):
        if out is not None and apart is not out:
            add_in_order(out, apart)


def small_case(dtype: torch.dtype, device: torch.device) -> list[tuple[object, ...]]:
    """More than one tile and several samples, for the check at first use: in every configuration, and in parts."""

    def case(inputs: int, long: int, full: bool, sketched: bool) -> tuple[object, ...]:
        x, dy, offsets = ragged_case([5, 0, long, 1], inputs, 48, dtype, device)
        generator = torch.Generator().manual_seed(1)
        matrices = [torch.rand(48, inputs, generator=generator).to(device) if full else None for _ in range(3)]
        return x, dy, offsets, *matrices, True, 0.5, Sketching(24, "oporp", 3, 4) if sketched else None

    aligned = [case(80, 70, full, sketched) for full, sketched in itertools.product((False, True), repeat=2)]
    return [*aligned, case(72, 70, False, False), case(72, FEW_TILES[0][1] + 8, True, True)]


def compile_cases() -> Iterator[CompileCase]:
    """Every configuration above: the norm alone, with each other result, and with all."""
    asked = {
        "norm": (False, False, False, False, False, NO_SKETCH),
        "dot": (False, True, False, False, False, NO_SKETCH),
        "second": (False, False, True, False, False, NO_SKETCH),
        "dot second absolute": (False, True, True, True, False, NO_SKETCH),
        "all but sketch": (False, True, True, True, True, NO_SKETCH),
        "sketch": (False, False, False, False, False, {"SKETCH": True, "KIND": 0}),
        "all, sjlt": (False, True, True, True, True, {"SKETCH": True, "KIND": 2}),
        "all, sjlt, from parts": (True, True, True, True, True, {"SKETCH": True, "KIND": 2}),
    }
    sizes = ("inputs", "outputs", "x_stride", "dy_stride")
    strides = ("v_stride", "second_stride", "absolute_stride", "group_stride")
    counts = ("tiles", "groups", "seed_low", "seed_high", "dim", "width", "ranges")
    for dtype, aligned, name in itertools.product(DTYPES, (True, False), asked):
        rows = {"x_ptr": POINTERS[dtype], "dy_ptr": POINTERS[dtype]}
        tables = {"steps_ptr": "*i64", "groups_ptr": "*i64", "bins_ptr": "*i64"}
        reals = ("parts", "v", "second", "absolute", "norms", "dots", "row_norms", "up")
        types: dict[str, Any] = {**rows, **{f"{part}_ptr": "*fp32" for part in reals}, **tables, "alpha": "fp32"}
        types |= dict.fromkeys((*sizes, *strides, *counts), "i32")
        *flags, sketch = asked[name]
        names = ("PARTS", "DOT", "SECOND", "ABSOLUTE", "ROWS")
        constants = {**dict(zip(names, flags, strict=True)), **sketch, "WIDEN": False}
        configuration = shipped(dtype, aligned, constants["ABSOLUTE"], constants["SKETCH"])
        yield CompileCase(
            f"sample_moments {name} {name_of(dtype, aligned)}", moments_kernel, configuration, types, constants,
            dtype != torch.float32 and not constants["PARTS"], aligned, counts,
        )  # fmt: skip
        if name == "norm":
            types = {
                **rows,
                "parts_ptr": "*fp32",
                "steps_ptr": "*i64",
                **dict.fromkeys(sizes[:4], "i32"),
                "tiles": "i32",
            }
            yield CompileCase(
                f"sample_moments part {name_of(dtype, aligned)}", part_kernel, configuration, types, {"WIDEN": False},
                dtype != torch.float32, aligned, ("tiles",),
            )  # fmt: skip
