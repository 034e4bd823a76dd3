"""Where the selected weights of a block lie, for the Triton kernels of masked steps and norms."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.selection import BLOCK, Places

WARPS = 8  # untimed: eight weights a thread


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
