"""`masked_norm` in Triton: one share a block, in float64, added up in order; no atomics."""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.selection import Places
from fillm_kernels.triton.configurations import DTYPES, POINTERS, CompileCase, launch_kernel, name_of
from fillm_kernels.triton.masked_step import (
    STEP,
    is_empty,
    place_arguments,
    place_types,
    places_case,
    places_of,
)


@triton.jit
def _squares(
    grad,  # [entries]
    shares,  # [programs], float64, zeros
    bits,
    starts,
    rows,
    entries,
    columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if is_empty(starts, ROWS):
        return
    at, chosen, _ = places_of(bits, starts, rows, entries, columns, ROWS, BLOCK)
    values = tl.load(grad + at, mask=chosen, other=0).to(tl.float64)
    tl.store(shares + tl.program_id(0).to(tl.int64), tl.sum(values * values, 0))


def launch(grad: Tensor, places: Places) -> Tensor:
    """Any shape -> scalar, float64."""
    programs, arguments = place_arguments(places, grad.device)
    shares = torch.zeros(programs, dtype=torch.float64, device=grad.device)
    launch_kernel(_squares, programs, STEP, grad.contiguous(), shares, *arguments, ROWS=places.rows is not None)
    return shares.sum()


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Places]:
    """Bits of several blocks, for the check at first use; entries from 1 to 2, so that one too many shows."""
    places = places_case(device)
    grad = 1 + torch.rand(places.sizes[0], generator=torch.Generator().manual_seed(1))
    return grad.to(device, dtype), places


def compile_cases() -> Iterator[CompileCase]:
    """Bits and rows, for every element type; most sizes are no multiples of 16."""
    for dtype, rows in product((*DTYPES, torch.float64), (False, True)):
        places, constants = place_types(rows)
        types = {"grad": POINTERS[dtype], "shares": "*fp64", **places}
        name = f"masked_norm {'rows' if rows else 'bits'} {name_of(dtype)}"
        yield CompileCase(name, _squares, STEP, types, {**constants, "ROWS": rows}, aligned=False)
