"""`ghost_gram`: inner products of all pairs of per-sample weight gradients of two sets, without forming one.

    <G_b, H_c> = sum_{t in b, s in c} (x1_t . x2_s)(dy1_t . dy2_s)    docs/method.md (7): K_ij = <g_i, g_j>

2 N1 N2 (I + O) FLOP in two library products per block of rows of either side; no N1 x N2 matrix is ever whole.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fillm_kernels.arguments import accumulation_dtype, as_tensor, check_offsets, check_ragged, sample_of_row
from fillm_kernels.dispatch import Backend, register, select, triton_backend
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.products import ieee_products, product
from fillm_kernels.rows import nonzero_rows

BLOCK_ROWS = 512  # rows of side 1 at a time, and at most four times as many of side 2: 4 MiB of pairs in float32


def ghost_gram(
    x1: Tensor | Any,
    dy1: Tensor | Any,
    offsets1: Tensor | Any,
    x2: Tensor | Any,
    dy2: Tensor | Any,
    offsets2: Tensor | Any,
) -> Tensor:
    """Inner products of all pairs of per-sample weight gradients of two sets, without forming one.

    <G_b, H_c> = sum_{t in b, s in c} (x1_t . x2_s)(dy1_t . dy2_s)    docs/method.md (7)

    Args:
        x1: layer inputs of the first set, packed, [N1, I], float32 | bfloat16 | float16 | float64.
        dy1: loss gradients at the layer's output, [N1, O], same dtype and device.
        offsets1: first row of each sample and N1 at the end, [B1 + 1], int64.
        x2: layer inputs of the second set, [N2, I], same dtype and device; the first set itself for a Gram matrix.
        dy2: loss gradients of the second set, [N2, O], same dtype and device.
        offsets2: first row of each sample and N2 at the end, [B2 + 1], int64.

    Returns:
        [B1, B2], float32 (float64 for float64 inputs), sums over blocks taken in float64; not differentiable.

    Raises:
        ShapeError: if sizes do not fit or offsets do not run from 0 to N.
        DtypeError: if an argument is no array, or dtypes differ or are not floating.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    first = as_tensor(x1, "x1"), as_tensor(dy1, "dy1"), as_tensor(offsets1, "offsets1")
    return _op(*first, as_tensor(x2, "x2"), as_tensor(dy2, "dy2"), as_tensor(offsets2, "offsets2"))


def _check(x1: Tensor, dy1: Tensor, offsets1: Tensor, x2: Tensor, dy2: Tensor, offsets2: Tensor) -> None:
    check_ragged(x1, dy1, offsets1)
    check_ragged(x2, dy2, offsets2)
    if x1.shape[1] != x2.shape[1] or dy1.shape[1] != dy2.shape[1]:
        widths = [x1.shape[1], dy1.shape[1]], [x2.shape[1], dy2.shape[1]]
        raise ShapeError(f"both sets must have the same I and O; got {widths[0]} and {widths[1]}")
    if x1.dtype != x2.dtype:
        raise DtypeError(f"both sets must have one dtype; got {x1.dtype} and {x2.dtype}")
    if x1.device != x2.device:
        raise DeviceError(f"both sets must lie on one device; got {x1.device} and {x2.device}")


def _reference(x1: Tensor, dy1: Tensor, offsets1: Tensor, x2: Tensor, dy2: Tensor, offsets2: Tensor) -> Tensor:
    """The definition from gradients formed in float64; the oracle of the tests. Two ragged sets -> [B1, B2]."""

    def formed(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
        rows = [dy[begin:end].double().T @ x[begin:end].double() for begin, end in pairwise(offsets.tolist())]
        return torch.stack(rows).flatten(1) if rows else x.new_zeros(0, x.shape[1] * dy.shape[1], dtype=torch.float64)

    return formed(x1, dy1, offsets1) @ formed(x2, dy2, offsets2).T


def _torch(x1: Tensor, dy1: Tensor, offsets1: Tensor, x2: Tensor, dy2: Tensor, offsets2: Tensor) -> Tensor:
    """Products of blocks of rows on torch's operators, on any device. Two ragged sets -> [B1, B2], float64."""
    return _blocks(x1, dy1, offsets1, None, x2, dy2, offsets2, None)


def _cpu(x1: Tensor, dy1: Tensor, offsets1: Tensor, x2: Tensor, dy2: Tensor, offsets2: Tensor) -> Tensor:
    """As `_torch`, without the rows of dy1 and dy2 that are all zero. Two ragged sets -> [B1, B2], float64."""
    rows1, rows2 = nonzero_rows(dy1), nonzero_rows(dy2)
    if rows1 is not None:
        offsets1 = torch.searchsorted(rows1, offsets1)
    if rows2 is not None:
        offsets2 = torch.searchsorted(rows2, offsets2)
    return _blocks(x1, dy1, offsets1, rows1, x2, dy2, offsets2, rows2)


def _blocks(
    x1: Tensor,
    dy1: Tensor,
    offsets1: Tensor,
    rows1: Tensor | None,
    x2: Tensor,
    dy2: Tensor,
    offsets2: Tensor,
    rows2: Tensor | None,
) -> Tensor:
    """Blocks of pairs of rows, added up by sample on one side, then on the other; rows1, rows2: all rows if None."""
    grams = torch.zeros(offsets1.shape[0] - 1, offsets2.shape[0] - 1, dtype=torch.float64, device=x1.device)
    with ieee_products():
        for block2, samples2, of_row2 in _row_blocks(offsets2, 4 * BLOCK_ROWS, x1.device):
            inside2, outside2 = _rows(x2, block2, rows2), _rows(dy2, block2, rows2)
            for block1, samples1, of_row1 in _row_blocks(offsets1, BLOCK_ROWS, x1.device):
                pairs = product(_rows(x1, block1, rows1), inside2.T)  # [n1, n2]
                pairs *= product(_rows(dy1, block1, rows1), outside2.T)
                by_first = _sum_rows(pairs, of_row1, samples1)  # [b1, n2]
                grams[samples1, samples2] += _sum_rows(by_first.T, of_row2, samples2).T
    return grams


def _row_blocks(offsets: Tensor, step: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of rows: which rows, which samples [b] they touch, and the place of each row's sample among these."""
    samples = sample_of_row(offsets, torch.device("cpu"))
    for begin in range(0, samples.shape[0], step):
        block = slice(begin, min(begin + step, samples.shape[0]))
        first, last = int(samples[begin]), int(samples[block.stop - 1])
        yield block, slice(first, last + 1), (samples[block] - first).to(device)


def _rows(matrix: Tensor, block: slice, rows: Tensor | None) -> Tensor:
    return matrix[block] if rows is None else matrix[rows[block]]


def _sum_rows(values: Tensor, of_row: Tensor, samples: slice) -> Tensor:
    """Sums of the rows [n, m] of each sample, in fixed order: of_row [n] ascends -> [b, m], float64."""
    count, values = samples.stop - samples.start, values.double()
    if not values.is_cuda:
        return values.new_zeros(count, values.shape[1]).index_add_(0, of_row, values)
    # index_add_ on CUDA adds in whatever order threads arrive; runs of rows are reduced in theirs.
    lengths = torch.bincount(of_row, minlength=count)
    return torch.segment_reduce(values.contiguous(), "sum", lengths=lengths, axis=0, initial=0)


@torch.library.custom_op("fillm_kernels::ghost_gram", mutates_args=())
def _op(x1: Tensor, dy1: Tensor, offsets1: Tensor, x2: Tensor, dy2: Tensor, offsets2: Tensor) -> Tensor:
    _check(x1, dy1, offsets1, x2, dy2, offsets2)
    host1, host2 = check_offsets(offsets1, x1.shape[0]), check_offsets(offsets2, x2.shape[0])
    run = select("ghost_gram", x1.device, x1.dtype)
    grams = run(x1.detach(), dy1.detach(), host1, x2.detach(), dy2.detach(), host2)
    return grams.to(device=x1.device, dtype=accumulation_dtype(x1.dtype)).contiguous()


@_op.register_fake
def _(x1: Tensor, dy1: Tensor, offsets1: Tensor, x2: Tensor, dy2: Tensor, offsets2: Tensor) -> Tensor:
    _check(x1, dy1, offsets1, x2, dy2, offsets2)
    return x1.new_empty(offsets1.shape[0] - 1, offsets2.shape[0] - 1, dtype=accumulation_dtype(x1.dtype))


register(
    "ghost_gram",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("ghost_gram"),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
