"""`masked_norm` in Triton: one share a block, in float64, added up in order; no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.selection import BLOCK, Places
from fillm_kernels.triton.device import device_of
from fillm_kernels.triton.masked_step import WARPS, is_empty, place_arguments, places_of


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
    if programs:
        constants = (places.rows is not None, BLOCK)
        with device_of(grad):
            _squares[(programs,)](
                grad.contiguous(), shares, *arguments, *constants, num_warps=WARPS, enable_fp_fusion=True
            )
    return shares.sum()
