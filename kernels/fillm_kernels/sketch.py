"""`sketch`: a vector of any length in `dim` numbers, inner products kept in expectation.

    E <S x, S y> = <x, y>,    Var <S x, S y> <= (|x|^2 |y|^2 + <x, y>^2) / dim       docs/method.md section 5; docs/kernels/sketch.md

CountSketch: Charikar, Chen, Farach-Colton 2002. OPORP: Li and Li 2023, arXiv 2302.03505. SJLT: Kane and Nelson 2014,
arXiv 1012.1577. The sparse kinds are block-wise (seed_law.BlockMap): a run of coordinates falls on a run of bins, rotated by
a hash, so no two of a run collide, nothing is scattered and no table is read. Every coordinate is hashed by its flat
64-bit index, so that a vector can come in pieces.
"""  # noqa: E501

import math
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import FLOATS, accumulation_dtype, as_integer, as_tensor
from fillm_kernels.dispatch import Backend, cuda_backend, register, select, triton_backend
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.products import ieee_products, product_by_entry
from fillm_kernels.seed_law import KINDS, LARGEST_DIM, SIGN, BlockMap, keys, negative, normal

SKETCHES = tuple(kind for kind in KINDS if kind != "tensorsketch")
DENSE = ("rademacher", "gaussian")
BLOCK_ENTRIES = 1 << 22  # entries of any intermediate of the torch backend
ROWS = 16  # vectors in one product of a dense kind; always as many, so that bits do not depend on the split of B


def sketch(
    g: Tensor | Any,
    dim: int,
    kind: str = "oporp",
    seed: int = 0,
    *,
    offset: int | Tensor | Any = 0,
    total: int | None = None,
    nonzeros: int = 4,
) -> Tensor:
    """Sketch every row of g; E <S x, S y> = <x, y>.

    docs/method.md section 5; which kind when: docs/kernels/sketch.md.

    Args:
        g: vectors, [B, P], float32 | bfloat16 | float16 | float64, any strides.
        dim: k, numbers a vector becomes; a multiple of `nonzeros` for `sjlt`.
        kind: `oporp`, `countsketch`, `sjlt`, `rademacher` or `gaussian`.
        seed: the map's seed, in [0, 2^63); `seed_law.tensor_seed` makes one for every tensor of a model.
        offset: flat index of g[:, 0], where g is a piece of longer vectors; sketches of the pieces add up. Dense kinds
            also take [B], int64, an index for every row. Rows next to each other that have the same one share the
            entries of the map, which are most of the work: sort them.
        total: length of the whole vectors, only to check that the piece lies inside.
        nonzeros: bins a coordinate of `sjlt` goes into.

    Returns:
        [B, dim], float32 (float64 for float64), in the unit of g; not differentiable. The same bits whatever other rows
        are in the call.

    Raises:
        ShapeError: if sizes, seed or offset are out of range, or `kind` is unknown.
        DtypeError: if g is no array or not floating, or offsets of rows are not int64.
        DeviceError: if offsets of rows lie elsewhere than g.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    g, dim, seed = as_tensor(g, "g"), as_integer(dim, "dim"), as_integer(seed, "seed")
    offsets = _offsets_of_rows(offset)
    last = offset = 0 if offsets is not None else as_integer(offset, "offset")
    if offsets is not None and total is not None and offsets.numel():
        last = int(offsets.max())
    if total is not None and g.ndim == 2 and last + g.shape[1] > total:
        raise ShapeError(f"a piece of {g.shape[1]} from offset {last} ends beyond total = {total}")
    return _op(g, dim, kind, seed, as_integer(nonzeros, "nonzeros"), offset, offsets)


def _offsets_of_rows(offset: int | Tensor | Any) -> Tensor | None:
    """The array among what an offset may be; None for a whole number, a tensor of no dimension included."""
    if isinstance(offset, (int, torch.SymInt)) or not hasattr(offset, "__dlpack__"):
        return None
    offsets = as_tensor(offset, "offset")
    return offsets if offsets.ndim else None


def _check(g: Tensor, dim: int, kind: str, seed: int, nonzeros: int, offset: int, offsets: Tensor | None) -> None:
    if g.ndim != 2:
        raise ShapeError(f"g must be [B, P]; got {list(g.shape)}")
    if g.dtype not in FLOATS:
        raise DtypeError(f"g must be float32, float64, bfloat16 or float16; got {g.dtype}")
    check_map(dim, kind, seed, nonzeros)
    if offset < 0 or offset + g.shape[1] >= 1 << 62:
        raise ShapeError(f"offset must be at least 0 and the piece end before 2^62; got {offset}")
    if offsets is None:
        return
    if kind not in DENSE:
        raise ShapeError(f"an offset for every row goes with {' and '.join(DENSE)} only; got kind {kind!r}")
    if offsets.dtype != torch.int64:
        raise DtypeError(f"offsets of rows must be int64; got {offsets.dtype}")
    if offsets.shape != g.shape[:1]:
        raise ShapeError(f"offsets of rows must be [B] = [{g.shape[0]}]; got {list(offsets.shape)}")
    if offsets.device != g.device:
        raise DeviceError(f"offsets of rows must lie where g does, {g.device}; got {offsets.device}")


def check_map(dim: int, kind: str, seed: int, nonzeros: int) -> None:
    """Refuse with a `ShapeError` what is no map."""
    if kind not in SKETCHES:
        raise ShapeError(f"kind must be one of {', '.join(SKETCHES)}; got {kind!r}")
    if not 1 <= dim <= LARGEST_DIM:
        raise ShapeError(f"dim must be in [1, 2^30]; got {dim}")
    if seed < 0:
        raise ShapeError(f"seed must be in [0, 2^63); got {seed}")
    if kind == "sjlt":
        BlockMap.of(kind, seed, dim, nonzeros)


def runs_of(offset: int | Tensor, rows: int) -> list[tuple[int, int, int]]:
    """First row, row after the last, and offset of all rows next to each other that have the same offset."""
    if isinstance(offset, int):
        return [(0, rows, offset)]
    values, counts = offset.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, values.tolist(), strict=True)) if ends else []


def _reference(g: Tensor, dim: int, kind: str, seed: int, nonzeros: int, offset: int | Tensor) -> Tensor:
    """The definition, coordinate by coordinate, in float64; the oracle of the tests. [B, P] -> [B, dim]."""
    if isinstance(offset, Tensor):
        places = enumerate(offset.tolist())
        parts = [_reference(g[row : row + 1], dim, kind, seed, nonzeros, at) for row, at in places]
        return torch.cat([g.new_empty(0, dim, dtype=torch.float64), *parts])
    coordinate = offset + torch.arange(g.shape[1], device=g.device)
    wide = g.double()
    if kind == "gaussian":
        matrix = normal(seed, kind, coordinate[:, None], torch.arange(dim, device=g.device))
        return wide @ matrix / math.sqrt(dim)
    if kind == "rademacher":
        bits = negative(keys(seed, kind, SIGN), coordinate[:, None], torch.arange(dim, device=g.device))
        return wide @ (1.0 - 2 * bits.double()) / math.sqrt(dim)
    law = BlockMap.of(kind, seed, dim, nonzeros)
    out = torch.zeros(g.shape[0], dim, dtype=torch.float64, device=g.device)
    for chunk in range(law.chunks):
        bins, bits = law.place(coordinate, chunk)
        out.index_add_(1, bins, wide * (1 - 2 * bits) * law.scale)
    return out


def _cpu(
    g: Tensor, dim: int, kind: str, seed: int, nonzeros: int, offset: int | Tensor, instruction_set: str = ""
) -> Tensor:
    """C++ (csrc/cpu/sketch.cpp, dense_sketch.cpp). [B, P] on the CPU -> [B, dim]."""
    if g.stride(1) != 1 and g.shape[1] > 1:
        step = max(1, BLOCK_ENTRIES // max(1, g.shape[0]))
        parts = [
            _cpu(piece.contiguous(), dim, kind, seed, nonzeros, offset + at * step, instruction_set)
            for at, piece in enumerate(g.split(step, 1))
        ]
        return torch.stack(parts).sum(0)
    out = torch.empty(g.shape[0], dim, dtype=accumulation_dtype(g.dtype))
    shared = {
        "values": g.data_ptr(),
        "stride": g.stride(0),
        "samples": g.shape[0],
        "count": g.shape[1],
        "offset": offset if isinstance(offset, int) else 0,
        "out": out.data_ptr(),
        "seed": seed,
        "kind": KINDS.index(kind),
        "dtype": native.DTYPE_CODES[str(g.dtype).removeprefix("torch.")],
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set,
    }
    if kind in DENSE:
        offsets = offset.contiguous() if isinstance(offset, Tensor) else None
        of_rows = {} if offsets is None else {"row_offsets": offsets.data_ptr()}
        native.extension.sketch_dense(dim=dim, **shared, **of_rows)
        return out
    law = BlockMap.of(kind, seed, dim, nonzeros)
    native.extension.sketch(chunks=law.chunks, ranges=law.ranges, width=law.width, scale=law.scale, **shared)
    return out


def _torch(g: Tensor, dim: int, kind: str, seed: int, nonzeros: int, offset: int | Tensor) -> Tensor:
    """Torch's operators on any device: for some blocks at a time, what falls on every bin. [B, P] -> [B, dim].

    Gathered, not scattered: an `index_add_` on CUDA adds in an order of its own.
    """
    if kind in DENSE:
        return project(g, dim, kind, seed, offset)
    law = BlockMap.of(kind, seed, dim, nonzeros)
    samples, count = g.shape
    out = torch.zeros(samples, law.chunks, law.chunk_dim, dtype=accumulation_dtype(g.dtype), device=g.device)
    bins = torch.arange(law.chunk_dim, device=g.device)
    first, last = offset // law.width, -(-(offset + count) // law.width)
    step = max(1, BLOCK_ENTRIES // law.chunk_dim)
    for begin in range(first, last if count else first, step):
        block = torch.arange(begin, min(begin + step, last), device=g.device)[:, None]
        for chunk in range(law.chunks):
            start = law.starts(block, chunk)
            at = block * law.width + (bins - start) % law.width - offset  # [blocks, bins]
            mine = (bins // law.width == start // law.width) & (at >= 0) & (at < count)
            sign = 1 - 2 * law.signs(block, bins, chunk)
            at.clamp_(0, count - 1)
            for vector, sums in zip(g, out[:, chunk], strict=True):  # one by one: bits do not depend on the others
                sums += (vector[at].to(out.dtype) * sign).masked_fill(~mine, 0).sum(0)
    return out.flatten(1) * law.scale


def project(g: Tensor, dim: int, kind: str, seed: int, offset: int | Tensor) -> Tensor:
    """A dense kind by matrix products, entries made for some coordinates at a time: g [B, P] -> [B, dim]."""
    count, dtype = g.shape[1], accumulation_dtype(g.dtype)
    out = torch.zeros(g.shape[0], dim, dtype=dtype, device=g.device)
    step = max(1, BLOCK_ENTRIES // (8 * dim))  # coordinates: the hash works on a few int64 copies of the block
    runs, together = runs_of(offset, g.shape[0]), max(1, step // max(1, count))
    with ieee_products():
        for turn in range(0, len(runs), together):
            some = runs[turn : turn + together]
            for begin in range(0, count, step):
                end_column = min(begin + step, count)
                spans = [torch.arange(at + begin, at + end_column, device=g.device) for _, _, at in some]
                matrices = _entries(torch.stack(spans), dim, kind, seed).to(dtype)  # [runs, columns, dim]
                for (top, end, _), matrix in zip(some, matrices, strict=True):
                    for row in range(top, end, ROWS):
                        piece = g[row : min(row + ROWS, end), begin:end_column].to(dtype)
                        padded = torch.nn.functional.pad(piece, (0, 0, 0, ROWS - piece.shape[0]))
                        out[row : row + piece.shape[0]] += product_by_entry(padded, matrix)[: piece.shape[0]]
    return out / math.sqrt(dim)


def _entries(coordinates: Tensor, dim: int, kind: str, seed: int) -> Tensor:
    """The map's entries, unscaled: [...] -> [..., dim], float64, or int64 for rademacher."""
    column = torch.arange(dim, device=coordinates.device)
    if kind == "gaussian":
        return normal(seed, kind, coordinates[..., None], column)
    return 1 - 2 * negative(keys(seed, kind, SIGN), coordinates[..., None], column)


@torch.library.custom_op("fillm_kernels::sketch", mutates_args=())
def _op(g: Tensor, dim: int, kind: str, seed: int, nonzeros: int, offset: int, offsets: Tensor | None = None) -> Tensor:
    _check(g, dim, kind, seed, nonzeros, offset, offsets)
    if offsets is not None and offsets.numel():
        least, most = (int(bound) for bound in offsets.aminmax())
        for bound in (least, most):
            _check(g, dim, kind, seed, nonzeros, bound, None)
    unable = {"cuda": f"computes the sparse kinds only, not {kind}"} if kind in DENSE else {}
    run, where = select("sketch", g.device, g.dtype, unable=unable), offset if offsets is None else offsets
    result = run(g.detach(), dim, kind, seed, nonzeros, where)
    return result.to(accumulation_dtype(g.dtype))


@_op.register_fake
def _(g: Tensor, dim: int, kind: str, seed: int, nonzeros: int, offset: int, offsets: Tensor | None = None) -> Tensor:
    _check(g, dim, kind, seed, nonzeros, offset, offsets)
    return g.new_empty(g.shape[0], dim, dtype=accumulation_dtype(g.dtype))


register(
    "sketch",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    cuda=cuda_backend("sketch"),
    triton=triton_backend("sketch", dtypes=()),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
