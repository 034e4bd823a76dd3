"""`sample_moments`: everything a statistic asks of per-sample weight gradients, from one visit of each of their tiles.

    G_b = dy_b^T x_b    ->    |G_b|^2,  <G_b, v>,  second += alpha sum_b G_b^2,  absolute += alpha sum_b |G_b|,
                              |row o of G_b|^2,  S vec(G_b)          docs/method.md (2), (4), (5), section 5

2 N I O FLOP, whatever is asked. A tile of G_b lives in registers and the first-level cache; `second` and `absolute` are
read and written once for a block of samples. No [B, O, I] is ever in memory. Where the squared norm alone is wanted,
`ghost_norm` takes fewer FLOP for samples shorter than 2 I O / (I + O).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import (
    accumulation_dtype,
    as_integer,
    as_tensor,
    check_memory,
    check_offsets,
    check_ragged,
)
from fillm_kernels.dispatch import Backend, register, select, triton_backend
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.products import ieee_products, product, product_by_entry
from fillm_kernels.rows import nonzero_rows
from fillm_kernels.seed_law import KINDS, BlockMap
from fillm_kernels.sketch import DENSE, check_map
from fillm_kernels.sketch import _cpu as sketch_on_cpu
from fillm_kernels.sketch import _reference as sketch_in_float64
from fillm_kernels.sketch import _torch as sketch_on_torch

BLOCK_ENTRIES = 1 << 22  # entries of gradients that are formed at a time, where they are: 16 MiB in float32
SAMPLES = 64  # whose blocks of rows are sketched together: every entry of the map is made once for all of them


class Moments(NamedTuple):
    """What `sample_moments` found; None for what was not asked.

    Attributes:
        squared_norms: `|G_b|^2`, [B].
        dots: `<G_b, v>`, [B].
        row_squared_norms: squared norm of every row of every gradient, [B, O].
        sketch: sketch of every gradient as a row-major vector, [B, sketch_dim].
    """

    squared_norms: Tensor
    dots: Tensor | None
    row_squared_norms: Tensor | None
    sketch: Tensor | None


class Sketching(NamedTuple):
    """Which map sketches the gradients: what `sketch` takes after its input.

    Attributes:
        dim: numbers a gradient becomes.
        kind: of `fillm_kernels.sketch.SKETCHES`.
        seed: in [0, 2^63).
        nonzeros: bins a coordinate of `sjlt` goes into.
    """

    dim: int
    kind: str
    seed: int
    nonzeros: int


def sample_moments(
    x: Tensor | Any,
    dy: Tensor | Any,
    offsets: Tensor | Any,
    v: Tensor | Any | None = None,
    second: Tensor | Any | None = None,
    absolute: Tensor | Any | None = None,
    *,
    rows: bool = False,
    alpha: float = 1.0,
    sketch_dim: int | None = None,
    kind: str = "oporp",
    seed: int = 0,
    nonzeros: int = 4,
) -> Moments:
    """Norms, dots, moments and sketches of per-sample weight gradients, each formed once and dropped.

    Args:
        x: layer inputs of all samples, packed, [N, I], float32 | bfloat16 | float16 | float64.
        dy: loss gradients at the layer's output, [N, O], same dtype and device.
        offsets: first row of each sample and N at the end, [B + 1], int64.
        v: a matrix [O, I] to take inner products with, of the same dtype or float32; None for none.
        second: [O, I], float32 (float64 for float64 inputs), `alpha sum_b G_b^2` is added to it: with alpha = 1/n the
            diagonal of the empirical Fisher matrix; any strides; None for none.
        absolute: likewise for `alpha sum_b |G_b|`.
        rows: whether the squared norm of every row is wanted.
        alpha: factor of what is added to `second` and `absolute`.
        sketch_dim: numbers in the sketch of `G_b.flatten()`, by the map of `sketch`; None for no sketch. The dense
            kinds, `rademacher` and `gaussian`, form blocks of rows of G_b for it.
        kind: of sketch: `oporp`, `countsketch`, `sjlt`, `rademacher` or `gaussian`.
        seed: the map's seed, in [0, 2^63).
        nonzeros: bins a coordinate of `sjlt` goes into.

    Returns:
        `Moments`, float32 (float64 for float64 inputs), accumulated in at least float32; not differentiable.

    Raises:
        ShapeError: if sizes do not fit, offsets do not run from 0 to N, entries of an output share memory, or the
            sketch has no such map.
        DtypeError: if an argument is no array, or dtypes do not go together.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    optional = {"v": v, "second": second, "absolute": absolute}
    given = {
        name: None if value is None else as_tensor(value, name, written=name != "v") for name, value in optional.items()
    }
    if sketch_dim is not None:
        sketch_dim = as_integer(sketch_dim, "sketch_dim")
    norms, dots, row_norms, sketches = _op(
        as_tensor(x, "x"), as_tensor(dy, "dy"), as_tensor(offsets, "offsets"), **given,
        rows=rows, alpha=alpha, kind=kind, sketch_dim=sketch_dim,
        seed=as_integer(seed, "seed"), nonzeros=as_integer(nonzeros, "nonzeros"),
    )  # fmt: skip
    return Moments(
        norms,
        None if v is None else dots,
        row_norms if rows else None,
        None if sketch_dim is None else sketches,
    )


def _check(
    x: Tensor, dy: Tensor, offsets: Tensor, v: Tensor | None, second: Tensor | None, absolute: Tensor | None
) -> None:
    check_ragged(x, dy, offsets)
    wide = accumulation_dtype(x.dtype)
    for name, matrix in (("v", v), ("second", second), ("absolute", absolute)):
        if matrix is None:
            continue
        if matrix.ndim != 2 or matrix.shape[0] != dy.shape[1] or matrix.shape[1] != x.shape[1]:
            raise ShapeError(f"{name} must be [O, I] = [{dy.shape[1]}, {x.shape[1]}]; got {list(matrix.shape)}")
        if matrix.dtype != wide and not (name == "v" and matrix.dtype == x.dtype):
            raise DtypeError(f"{name} must be {wide}; got {matrix.dtype}")
        if matrix.device != x.device:
            raise DeviceError(f"{name} must lie where x does, {x.device}; got {matrix.device}")
        spread = zip(matrix.shape, matrix.stride(), strict=True)
        if name != "v" and min(matrix.shape) > 0 and any(n > 1 and step == 0 for n, step in spread):
            raise ShapeError(f"{name} is an expanded view whose entries share memory; pass memory of its own")


Found = tuple[Tensor, Tensor, Tensor, Tensor]  # [B], [B] or [0], [B, O] or [0, 0], [B, dim] or [0, 0]; at least float32


def _empty(
    x: Tensor, dy: Tensor, offsets: Tensor, dotted: bool, rows: bool, dim: int | None, dtype: torch.dtype
) -> Found:
    count = offsets.shape[0] - 1
    return (
        x.new_zeros(count, dtype=dtype),
        x.new_zeros(count if dotted else 0, dtype=dtype),
        x.new_zeros((count, dy.shape[1]) if rows else (0, 0), dtype=dtype),
        x.new_zeros((0, 0) if dim is None else (count, dim), dtype=dtype),
    )


def _reference(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    v: Tensor | None,
    second: Tensor | None,
    absolute: Tensor | None,
    rows: bool,
    alpha: float,
    sketching: Sketching | None,
) -> Found:
    """The definition, sample by sample, in float64; the oracle of the tests."""
    dim = sketching.dim if sketching else None
    norms, dots, row_norms, sketches = found = _empty(x, dy, offsets, v is not None, rows, dim, torch.float64)
    squares, magnitudes = 0.0, 0.0
    for sample, (begin, end) in enumerate(pairwise(offsets.tolist())):
        gradient = dy[begin:end].double().T @ x[begin:end].double()
        norms[sample] = gradient.square().sum()
        if v is not None:
            dots[sample] = (gradient * v.double()).sum()
        if rows:
            row_norms[sample] = gradient.square().sum(1)
        if sketching:
            sketches[sample] = sketch_in_float64(gradient.reshape(1, -1), *sketching, 0)[0]
        squares, magnitudes = squares + gradient.square(), magnitudes + gradient.abs()
    for out, total in ((second, squares), (absolute, magnitudes)):
        if out is not None:
            out.copy_(out.double() + alpha * total)
    return found


def _torch(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    v: Tensor | None,
    second: Tensor | None,
    absolute: Tensor | None,
    rows: bool,
    alpha: float,
    sketching: Sketching | None,
) -> Found:
    """Torch's operators on any device: blocks of rows of one gradient at a time."""
    dim = sketching.dim if sketching else None
    norms, dots, row_norms, sketches = found = _empty(x, dy, offsets, v is not None, rows, dim, torch.float64)
    step = max(1, BLOCK_ENTRIES // max(1, x.shape[1]))
    with ieee_products():
        for sample, (begin, end) in enumerate(pairwise(offsets.tolist())):
            for first in range(0, dy.shape[1] if end > begin else 0, step):
                block = slice(first, first + step)
                gradient = product(dy[begin:end, block].T, x[begin:end])
                squares = gradient.square()
                sums = squares.sum(1, dtype=torch.float64)
                norms[sample] += sums.sum()
                if rows:
                    row_norms[sample, block] = sums
                if v is not None:
                    dots[sample] += (gradient * v[block].to(gradient.dtype)).sum(dtype=torch.float64)
                if second is not None:
                    second[block].add_(squares, alpha=alpha)
                if absolute is not None:
                    absolute[block].add_(gradient.abs_(), alpha=alpha)
    if sketching:
        sketches.copy_(sketch_formed(x, dy, offsets, sketching, sketch_on_torch))
    return found


def sketch_formed(x: Tensor, dy: Tensor, offsets: Tensor, sketching: Sketching, run: Callable[..., Tensor]) -> Tensor:
    """Sketches by a backend of `sketch`, from blocks of rows of the gradients of some samples at a time.

    The blocks are cut by the width of x alone, so a sample's bits do not depend on the others. [B] -> [B, dim].
    """
    bounds, inputs, outputs = offsets.tolist(), x.shape[1], dy.shape[1]
    samples, step = len(bounds) - 1, max(1, BLOCK_ENTRIES // (SAMPLES * max(1, inputs)))
    wide = accumulation_dtype(x.dtype)
    sketches = x.new_zeros(samples, sketching.dim, dtype=wide)
    with ieee_products():
        for group in range(0, samples, SAMPLES):
            last = min(group + SAMPLES, samples)
            for first in range(0, outputs, step):
                rows = dy[:, first : first + step]
                formed = x.new_empty(last - group, rows.shape[1], inputs, dtype=wide)
                for own, (begin, end) in zip(formed, pairwise(bounds[group : last + 1]), strict=True):
                    product_by_entry(rows[begin:end].T, x[begin:end], own)
                sketches[group:last] += run(formed.flatten(1), *sketching, first * inputs)
    return sketches


def _cpu(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    v: Tensor | None,
    second: Tensor | None,
    absolute: Tensor | None,
    rows: bool,
    alpha: float,
    sketching: Sketching | None,
    instruction_set: str = "",
) -> Found:
    """C++ (csrc/cpu/sample_moments.cpp), without the rows of dy that are all zero; dense sketches of formed blocks."""
    dim = sketching.dim if sketching else None
    norms, dots, row_norms, sketches = _empty(x, dy, offsets, v is not None, rows, dim, torch.float64)
    wide = accumulation_dtype(x.dtype)
    law = None
    if sketching and sketching.kind in DENSE:
        run = partial(sketch_on_cpu, instruction_set=instruction_set)
        sketches.copy_(sketch_formed(x, dy, offsets, sketching, run))
    elif sketching:
        law = BlockMap.of(sketching.kind, sketching.seed, sketching.dim, sketching.nonzeros)
        sketches = torch.empty_like(sketches, dtype=wide)
    used = nonzero_rows(dy)
    if used is not None:
        offsets = torch.searchsorted(used, offsets)
    matrices = {
        "v": None if v is None else v.to(wide).contiguous(),
        # Written along rows; what lies otherwise is summed apart and added.
        **{name: _along_rows(out) for name, out in (("second", second), ("absolute", absolute))},
    }
    nowhere = (0, 0, 0, native.DTYPE_CODES[str(wide).removeprefix("torch.")])
    native.extension.sample_moments(
        x=native.address(x),
        dy=native.address(dy),
        inputs=x.shape[1],
        outputs=dy.shape[1],
        rows=0 if used is None else used.data_ptr(),
        offsets=offsets.data_ptr(),
        samples=norms.shape[0],
        **{name: nowhere if matrix is None else native.address(matrix) for name, matrix in matrices.items()},
        alpha=alpha,
        norms=norms.data_ptr(),
        dots=0 if v is None else dots.data_ptr(),
        row_norms=row_norms.data_ptr() if rows else 0,
        sketches=sketches.data_ptr() if law else 0,
        seed=law.seed if law else 0,
        kind=KINDS.index(law.kind) if law else 0,
        chunks=law.chunks if law else 0,
        ranges=law.ranges if law else 0,
        width=law.width if law else 0,
        scale=law.scale if law else 0.0,
        computes=nowhere[3],
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    for out, summed in ((second, matrices["second"]), (absolute, matrices["absolute"])):
        if out is not None and summed is not out:
            out.add_(summed)
    return norms, dots, row_norms, sketches


def _along_rows(out: Tensor | None) -> Tensor | None:
    return out if out is None or out.stride(1) == 1 or out.shape[1] <= 1 else torch.zeros_like(out).contiguous()


@torch.library.custom_op("fillm_kernels::sample_moments", mutates_args=("second", "absolute"))
def _op(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    v: Tensor | None,
    second: Tensor | None,
    absolute: Tensor | None,
    rows: bool,
    alpha: float,
    sketch_dim: int | None = None,
    kind: str = "oporp",
    seed: int = 0,
    nonzeros: int = 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, dy, offsets, v, second, absolute)
    sketching = None if sketch_dim is None else Sketching(sketch_dim, kind, seed, nonzeros)
    if sketching:
        check_map(*sketching)
    check_memory({"second": second, "absolute": absolute}, {"x": x, "dy": dy, "v": v, "offsets": offsets})
    host = check_offsets(offsets, x.shape[0])
    plain = [None if matrix is None else matrix.detach() for matrix in (v, second, absolute)]
    found = select("sample_moments", x.device, x.dtype)(x.detach(), dy.detach(), host, *plain, rows, alpha, sketching)
    wide = accumulation_dtype(x.dtype)
    return tuple(part.to(device=x.device, dtype=wide) for part in found)


@_op.register_fake
def _(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    v: Tensor | None,
    second: Tensor | None,
    absolute: Tensor | None,
    rows: bool,
    alpha: float,
    sketch_dim: int | None = None,
    kind: str = "oporp",
    seed: int = 0,
    nonzeros: int = 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, dy, offsets, v, second, absolute)
    if sketch_dim is not None:
        check_map(sketch_dim, kind, seed, nonzeros)
    return _empty(x, dy, offsets, v is not None, rows, sketch_dim, accumulation_dtype(x.dtype))


register(
    "sample_moments",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("sample_moments"),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
