"""`soir_sweep` in Triton: a program takes a part of a tensor's rows, four at a time, dots first, then the weighted sum.

The second use of a row finds it in the cache. Parts have accumulators of their own, in global memory and mostly in the
cache too, added up in order at the end. float64 sketches go to torch's operators.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fillm_kernels.arguments import accumulation_dtype
from fillm_kernels.soir_sweep import damping_of, on_torch
from fillm_kernels.triton.configurations import (
    DTYPES,
    POINTERS,
    CompileCase,
    Configuration,
    launch_kernel,
    name_of,
)

# untimed; at most 64 registers on sm_80, sm_90 and sm_100; 2048 columns spilled on sm_90 with Triton 3.7 (2).
SWEEP = Configuration({"ROWS": 4, "BLOCK": 1024}, num_warps=8, num_stages=1)
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
    parts,
    n,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor, part = program // parts, program % parts
    row = n * part // parts
    last = n * (part + 1) // parts
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    own = sums + program * k
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
    tl.store(cross + program, total)


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
    programs = parts * tensors if s.numel() else 0
    launch_kernel(_sweep, programs, SWEEP, s, v, norms, lam, dots, sums, cross, parts, rows, k)
    weighted, n = sums.sum(1, dtype=torch.float64), max(rows, 1)
    rest = (v.double() - weighted / n).square().sum(1)
    return dots, weighted.float(), torch.stack([lam, cross.sum(1) / n, rest, v.double().square().sum(1)], 1)


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float, list[int]]:
    """Two tensors of two parts and two blocks of columns, for the check at first use.

    Sketches that resemble v, and a damping of a size with their norms, so that no number of the result drowns in
    another beside which it is compared.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 2100, generator=generator)
    s = v[:, None] + torch.randn(2, 37, 2100, generator=generator)
    norms = s.double().square().sum(2)
    return s.to(device, dtype), v.to(device, accumulation_dtype(dtype)), norms.to(device), 500.0, [2100, 1000]


def compile_cases() -> Iterator[CompileCase]:
    """The configuration above for every element type, for widths that are multiples of 16 and others."""
    for dtype, aligned in product(DTYPES, (True, False)):
        types = {"s": POINTERS[dtype], "v": "*fp32", "norms": "*fp64", "damping": "*fp64", "dots": "*fp32"}
        types |= {"sums": "*fp32", "cross": "*fp64", "parts": "i32", "n": "i32", "k": "i32"}
        name = f"soir_sweep {name_of(dtype, aligned)}"
        yield CompileCase(name, _sweep, SWEEP, types, aligned=aligned, counts=("parts", "n"))
