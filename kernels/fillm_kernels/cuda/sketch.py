"""`sketch` in CUDA C++ (csrc/cuda/sketch.cu), the sparse kinds. A warp owns bins in registers. Untimed."""

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import accumulation_dtype
from fillm_kernels.cuda.calls import call, dtype_code
from fillm_kernels.seed_law import KINDS, BlockMap


def launch(g: Tensor, dim: int, kind: str, seed: int, nonzeros: int, offset: int) -> Tensor:
    """The backend: g [B, P], any strides -> [B, dim], float32 (float64 for float64)."""
    law = BlockMap.of(kind, seed, dim, nonzeros)
    samples, count = g.shape
    job = native.cuda_extension().Sketch(
        seed=seed,
        kind=KINDS.index(kind),
        chunks=law.chunks,
        ranges=law.ranges,
        width=law.width,
        samples=samples,
        count=count,
        stride=g.stride(0),
        step=g.stride(1) if count > 1 else 1,
        offset=offset,
    )
    dtype = accumulation_dtype(g.dtype)
    parts = torch.empty(samples, job.parts(), dim, dtype=dtype, device=g.device)
    out = torch.empty(samples, dim, dtype=dtype, device=g.device)
    call(
        job.run,
        g,
        dtype=dtype_code(g),
        values=g.data_ptr(),
        parts=parts.data_ptr(),
        out=out.data_ptr(),
        scale=law.scale,
    )
    return out


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int, str, int, int, int]:
    """Several chunks, blocks cut at both ends and more than one group of them, for the check at first use."""
    g = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0))
    return g.to(device, dtype), 60, "sjlt", 5, 4, 7
