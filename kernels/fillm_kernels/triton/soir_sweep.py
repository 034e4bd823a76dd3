"""`soir_sweep` in Triton: a program takes a part of a tensor's rows, four at a time, dots first, then the weighted sum.

The second use of a row finds it in the cache. Parts have accumulators of their own, in global memory and mostly in the
cache too, added up in order at the end. float64 sketches go to torch's operators. The configuration is untimed.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.soir_sweep import damping_of, on_torch
from fillm_kernels.triton.device import device_of

ROWS = 4
BLOCK = 2048
WARPS = 8
MOST_PARTS = 128  # of a tensor: sizes alone decide, never the device
LEAST_ROWS = 16  # of a part, so that accumulators are a sixteenth of the store at most


@triton.jit
def _sweep(
    s,  # [L, n, k]
    v,  # [L, k], float32
    norms,  # [L, n], float64
    damping,  # [L], float64
    dots,  # [L, n], float32
    sums,  # [L, parts, k], float32, zeros
    cross,  # [L, parts], float64
    n,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    tensor = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0).to(tl.int64)
    row = n * part // parts
    last = n * (part + 1) // parts
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    own = sums + (tensor * parts + part) * k
    lam = tl.load(damping + tensor)
    total = lam * 0
    while row < last:
        inside = row + lane < last
        store = s + (tensor * n + row + lane).to(tl.int64)[:, None] * k
        dot = tl.zeros([ROWS], dtype=tl.float64)
        for begin in range(0, k, BLOCK):
            at = begin + column
            tile = tl.load(store + at[None, :], mask=inside[:, None] & (at < k)[None, :], other=0).to(tl.float32)
            factor = tl.load(v + tensor * k + at, mask=at < k, other=0)
            dot += tl.sum(tile * factor[None, :], 1).to(tl.float64)
        curvature = lam + tl.load(norms + tensor * n + row + lane, mask=inside, other=1)
        nothing = (curvature == 0) & (dot == 0)
        c = tl.where(nothing, 0.0, dot / tl.where(nothing, 1.0, curvature))
        tl.store(dots + tensor * n + row + lane, dot.to(tl.float32), mask=inside)
        total += tl.sum(tl.where(inside, c * dot, 0.0), 0)
        weight = c.to(tl.float32)
        for begin in range(0, k, BLOCK):
            at = begin + column
            tile = tl.load(store + at[None, :], mask=inside[:, None] & (at < k)[None, :], other=0).to(tl.float32)
            before = tl.load(own + at, mask=at < k, other=0)
            tl.store(own + at, before + tl.sum(tile * weight[:, None], 0), mask=at < k)
        tl.debug_barrier()  # what one thread added to the sums another may read for the next rows
        row += ROWS
    tl.store(cross + tensor * parts + part, total)


def launch(s: Tensor, v: Tensor, norms: Tensor, damping: float, numel: Sequence[int]) -> tuple[Tensor, ...]:
    """[L, n, k], [L, k], [L, n] -> [L, n], [L, k], [L, 4]; the arguments are checked."""
    if s.dtype == torch.float64:
        return on_torch(s, v, norms, damping, numel)
    tensors, rows, k = s.shape
    s, v, lam = s.contiguous(), v.float().contiguous(), damping_of(norms, damping, numel)
    parts = max(1, min(MOST_PARTS, rows // LEAST_ROWS))
    dots = torch.empty(tensors, rows, dtype=torch.float32, device=s.device)
    sums = torch.zeros(tensors, parts, k, dtype=torch.float32, device=s.device)
    cross = torch.zeros(tensors, parts, dtype=torch.float64, device=s.device)
    if s.numel():
        with device_of(s):
            _sweep[(parts, tensors)](
                s, v, norms, lam, dots, sums, cross, rows, k, ROWS, BLOCK, num_warps=WARPS, enable_fp_fusion=True
            )
    weighted, n = sums.sum(1, dtype=torch.float64), max(rows, 1)
    rest = (v.double() - weighted / n).square().sum(1)
    return dots, weighted.float(), torch.stack([lam, cross.sum(1) / n, rest, v.double().square().sum(1)], 1)
