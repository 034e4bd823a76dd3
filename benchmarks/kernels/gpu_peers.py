"""Public projections of gradients beside `sketch` on the same matrix; one that is not there says so in its row.

`index_add_` with stored bins and signs and the dense Gaussian of the matrix library need torch alone. The others are
packages of their own: `sjlt` (arXiv 2505.18976) and `traker` with `fast_jl` (arXiv 2303.14186).
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import fillm_kernels as fk
import torch
from torch import Tensor

from benchmarks.kernels.gpu_calls import name_of
from benchmarks.kernels.gpu_streams import sketch_shapes
from benchmarks.kernels.gpu_timing import Clock, seconds

LARGEST_MATRIX = 16 << 30  # bytes of a stored projection
Project = Callable[[Tensor], Tensor]


class Absent(Exception):
    """Why a peer does not run here, in words."""


def scattered(g: Tensor, dim: int) -> Project:
    """A table of bins and signs, 12 bytes a coordinate, and `index_add_`."""
    bins = torch.randint(dim, (g.shape[1],), device=g.device)
    signs = torch.randint(2, (g.shape[1],), device=g.device).mul_(2).sub_(1).to(g.dtype)
    return lambda g: g.new_zeros(g.shape[0], dim).index_add_(1, bins, g * signs)


def gaussian(g: Tensor, dim: int) -> Project:
    """A stored Gaussian matrix and one library product."""
    size = g.shape[1] * dim * g.dtype.itemsize
    if size > LARGEST_MATRIX:
        raise Absent(f"the matrix would take {size / 1e9:,.0f} GB")
    matrix = torch.randn(g.shape[1], dim, device=g.device, dtype=g.dtype)
    return lambda g: g @ matrix


def sjlt(g: Tensor, dim: int, nonzeros: int) -> Project:
    """The CUDA kernel of the package `sjlt`: tables, and atomic additions in float32."""
    made: Project = _imported("sjlt").SJLTProjection(original_dim=g.shape[1], proj_dim=dim, c=nonzeros)
    return made


def fast_jl(g: Tensor, dim: int) -> Project:
    """TRAK's projector: a dense random matrix made on the fly."""
    projectors = _imported("trak.projectors")
    if dim % 512:
        raise Absent(f"its dimension must be a multiple of 512; {dim} was asked")
    kind = projectors.ProjectionType.rademacher
    made = projectors.CudaProjector(g.shape[1], dim, 0, kind, g.device)
    return lambda g: made.project(g, 0)


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Absent(f"not installed: {error}") from None


# By name: what makes it, and the kind of `sketch` it is compared with.
PEERS: dict[str, tuple[Callable[[Tensor, int], Project], str]] = {
    "index_add_": (scattered, "oporp"),
    "sjlt, 1 nonzero": (partial(sjlt, nonzeros=1), "oporp"),
    "sjlt, 4 nonzeros": (partial(sjlt, nonzeros=4), "sjlt"),
    "fast_jl, Rademacher": (fast_jl, "rademacher"),
    "Gaussian matrix kept": (gaussian, "gaussian"),
}
TARGET = 2.0  # times as fast as the fastest public sparse kernel
SPARSE = ("oporp", "sjlt")


def peer_rows(device: torch.device, shrink: int, clock: Clock, share: float) -> Iterator[dict[str, Any]]:
    """A row for every peer and shape: milliseconds of both, their ratio, or why there is none."""
    dim = max(64, 4096 // shrink)
    shapes = [(*shape, dim) for shape in sketch_shapes(shrink)]
    shapes += [(8, max(4096, count // shrink**2), torch.float32, k) for count, k in ((1 << 18, dim), (1 << 24, 64))]
    for samples, count, dtype, k in shapes:
        for name, (make, kind) in PEERS.items():
            row: dict[str, Any] = {
                "peer": name,
                "shape": f"{samples} x {count} to {k} {name_of(dtype)}",
                "beside": kind,
            }
            if clock.left(share) <= 0:
                yield {**row, "verdict": "left out: time"}
                continue
            try:
                yield {**row, **_times(device, samples, count, dtype, k, make, kind)}
            except Absent as error:
                yield {**row, "verdict": f"left out: {error}"}
            except Exception as error:  # a peer may raise anything
                yield {**row, "verdict": f"left out: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _times(
    device: torch.device, samples: int, count: int, dtype: torch.dtype, dim: int, make: Any, kind: str
) -> dict[str, Any]:
    g = torch.randn(samples, count, device=device, dtype=dtype)
    project = make(g, dim)
    shape = tuple(project(g).shape)
    if shape != (samples, dim):
        raise Absent(f"it returned {shape}")
    peer = median(seconds(lambda: project(g), device))
    if kind not in SPARSE and samples * count * dim > 1 << 36:
        return {"peer_milliseconds": 1e3 * peer, "verdict": "sketch not timed: dense, for small dimensions alone"}
    own = median(seconds(lambda: fk.sketch(g, dim, kind), device))
    ratio = peer / own
    reached = "reached" if ratio >= TARGET else "below target"
    return {
        "peer_milliseconds": 1e3 * peer,
        "sketch_milliseconds": 1e3 * own,
        "peer / sketch": ratio,
        "sketch_gigabytes_per_second": g.nbytes / own / 1e9,
        "target": TARGET if kind in SPARSE else "",
        "verdict": reached if kind in SPARSE else "no target",
    }
