"""Where the selected weights of a block lie, for the Triton kernels of masked steps and norms."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.arguments import accumulation_dtype
from fillm_kernels.selection import BLOCK, Places, select_bits
from fillm_kernels.top_mask import pack_bits
from fillm_kernels.triton.configurations import DTYPES, Configuration

STEP = Configuration({"BLOCK": BLOCK}, num_warps=8, num_stages=1)  # 8 weights a thread; untimed; sm_90: 104 registers


@triton.jit
def places_of(
    bits,  # [ceil(entries / 8)], uint8, or anything if ROWS
    starts,  # [blocks + 1], int64, or anything if ROWS
    rows,  # [R], int64, or anything if not ROWS
    entries,
    columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program's weights: flat indices, whether each is selected, places in the state. [BLOCK] each."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    if ROWS:
        chunks = (columns + BLOCK - 1) // BLOCK
        row = program // chunks
        column = (program % chunks) * BLOCK + lane
        chosen = column < columns
        at = tl.load(rows + row) * columns + column
        state = row * columns + column
    else:
        at = program * BLOCK + lane
        byte = tl.load(bits + at // 8, mask=at < entries, other=0).to(tl.int32)
        bit = (byte >> (lane % 8)) & 1
        chosen = bit == 1
        state = tl.load(starts + program) + tl.cumsum(bit, 0) - 1
    return at, chosen, state


@triton.jit
def is_empty(starts, ROWS: tl.constexpr):
    """Whether a program's block of bits has none set."""
    program = tl.program_id(0).to(tl.int64)
    empty = program < 0
    if not ROWS:
        empty = tl.load(starts + program) == tl.load(starts + program + 1)
    return empty


def place_arguments(places: Places, device: torch.device) -> tuple[int, tuple[Any, ...]]:
    """Number of programs, and what `places_of` takes before its constants."""
    bits, starts, rows, (entries, columns, _) = places
    unused: Tensor = torch.empty(1, dtype=torch.int64, device=device)
    if rows is not None:
        return rows.shape[0] * triton.cdiv(columns, BLOCK), (unused, unused, rows, entries, columns)
    return triton.cdiv(entries, BLOCK), (bits, starts, unused, entries, 1)


def places_case(device: torch.device) -> Places:
    """Bits of four blocks, the last one short and the second one empty, for the checks at first use."""
    chosen = torch.rand(3 * BLOCK + 101, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen[BLOCK : 2 * BLOCK] = False
    return select_bits(pack_bits(chosen).to(device), chosen.shape[0]).places()


def step_case(
    dtype: torch.dtype, device: torch.device, curvatures: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Places, Tensor]:
    """Parameter, gradient, first and second state, places and clip factor, for the checks at first use.

    The callers' factors are powers of two, and `curvatures`, what the second state is drawn from, are such that new
    parameters are sixteenths below 4: two bfloat16 results never differ by how a float32 one was rounded before.
    """
    places, wide = places_case(device), accumulation_dtype(dtype)
    entries, _, count = places.sizes
    generator = torch.Generator().manual_seed(1)
    param = torch.randint(-16, 17, (entries,), generator=generator) / 8
    grad = torch.randint(0, 2, (entries,), generator=generator) * 4.0 - 2
    first = torch.randint(-7, 8, (count,), generator=generator)
    second = torch.tensor(curvatures)[torch.randint(len(curvatures), (count,), generator=generator)]
    clip = torch.full((), 0.5, dtype=torch.float64, device=device)
    values, state = (param.to(device, dtype), grad.to(device, dtype)), (first.to(device, wide), second.to(device, wide))
    return *values, *state, places, clip


def place_types(rows: bool) -> tuple[dict[str, str], dict[str, int]]:
    """Types and constants of what `place_arguments` gives, for the compile cases."""
    types = {"bits": "*i64" if rows else "*u8", "starts": "*i64", "rows": "*i64", "entries": "i32"}
    return (types | {"columns": "i32"}, {}) if rows else (types, {"columns": 1})


def value_types() -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Element types of a parameter and its gradient for the compile cases; a float32 one may come with either half."""
    yield from ((dtype, dtype) for dtype in DTYPES)
    yield torch.bfloat16, torch.float32
