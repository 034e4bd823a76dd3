"""`ghost_dot`: inner product of every per-sample weight gradient with one matrix, without forming a gradient.

    <G_b, v> = sum_{t in b} dy_t^T v x_t = sum_t < (dy v)_t , x_t > = sum_t < dy_t , (x v^T)_t >    docs/method.md (5)

2 N I O FLOP: one matrix product whose [N, min(I, O)] result is never whole. The C++ product (csrc/cpu/matmul.cpp) takes
the row dots from its register tiles; torch's is taken over blocks of rows.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import accumulation_dtype, as_tensor, check_offsets, check_ragged
from fillm_kernels.dispatch import Backend, register, select, triton_backend
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.products import ieee_products, product
from fillm_kernels.rows import nonzero_rows

BLOCK_ENTRIES = 1 << 18  # entries of the intermediate of one block: 1 MiB in float32, read back while still in cache
LEAST_ROWS = 128  # shorter blocks would read v again for too little work


def ghost_dot(x: Tensor | Any, dy: Tensor | Any, v: Tensor | Any, offsets: Tensor | Any) -> Tensor:
    """Inner product of every per-sample weight gradient with one matrix, without forming a gradient.

    <G_b, v> = sum_t < (dy v)_t , x_t >    docs/method.md (5)

    Args:
        x: layer inputs of all samples, packed, [N, I], float32 | bfloat16 | float16 | float64.
        dy: loss gradients at the layer's output, [N, O], same dtype and device.
        v: the matrix, [O, I], of the same dtype, or float32 where x and dy are bfloat16 or float16.
        offsets: first row of each sample and N at the end, [B + 1], int64.

    Returns:
        [B], float32 (float64 for float64 inputs), accumulated in at least float32; not differentiable.

    Raises:
        ShapeError: if sizes do not fit or offsets do not run from 0 to N.
        DtypeError: if an argument is no array, or dtypes do not go together.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    return _op(as_tensor(x, "x"), as_tensor(dy, "dy"), as_tensor(v, "v"), as_tensor(offsets, "offsets"))


def _check(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> None:
    check_ragged(x, dy, offsets)
    if v.ndim != 2 or v.shape[0] != dy.shape[1] or v.shape[1] != x.shape[1]:
        raise ShapeError(f"v must be [O, I] = [{dy.shape[1]}, {x.shape[1]}]; got {list(v.shape)}")
    if v.dtype not in (x.dtype, accumulation_dtype(x.dtype)):
        allowed = " or ".join(dict.fromkeys(str(dtype) for dtype in (x.dtype, accumulation_dtype(x.dtype))))
        raise DtypeError(f"v must be {allowed}; got {v.dtype}")
    if v.device != x.device:
        raise DeviceError(f"v must lie where x does, {x.device}; got {v.device}")


def _reference(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """The definition, sample by sample, in float64; the oracle of the tests. [N, I], [N, O], [O, I] -> [B]."""
    bounds = offsets.tolist()
    dots = [((dy[begin:end].double().T @ x[begin:end].double()) * v.double()).sum() for begin, end in pairwise(bounds)]
    return torch.stack(dots) if dots else torch.zeros(0, dtype=torch.float64)


def _torch(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """One product and a row dot per block of rows, on any device. [N, I], [N, O], [O, I], [B + 1] -> [B], float64."""
    return _sum_by_sample(_row_dots(x, dy, v), offsets)


def _cpu(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor, instruction_set: str = "") -> Tensor:
    """C++, without the rows of dy that are all zero. [N, I], [N, O], [O, I], [B + 1] -> [B], float64."""
    rows = nonzero_rows(dy)
    dots = torch.empty(x.shape[0] if rows is None else rows.shape[0], dtype=torch.float64)
    # The narrower of dy v and x v^T: fewer entries to multiply with those of the other side.
    left, right, matrix = (dy, x, v) if x.shape[1] <= dy.shape[1] else (x, dy, v.T)
    native.extension.matmul_row_dots(
        m=dots.shape[0],
        n=right.shape[1],
        k=left.shape[1],
        a=native.address(left),
        b=native.address(matrix),
        other=native.address(right),
        m_rows=0 if rows is None else rows.data_ptr(),
        dots=dots.data_ptr(),
        computes=native.DTYPE_CODES[str(accumulation_dtype(x.dtype)).removeprefix("torch.")],
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    return _sum_by_sample(dots, offsets if rows is None else torch.searchsorted(rows, offsets))


def _row_dots(x: Tensor, dy: Tensor, v: Tensor) -> Tensor:
    """dy_t^T v x_t of all rows: x [N, I], dy [N, O], v [O, I] -> [N], float64."""
    count = x.shape[0]
    # The narrower of dy v and x v^T: the product costs the same, what is written and read back does not.
    left, right, matrix = (dy, x, v) if x.shape[1] <= dy.shape[1] else (x, dy, v.T)
    if not v.is_cuda or v.dtype != x.dtype:
        matrix = matrix.to(accumulation_dtype(x.dtype))
    step = max(LEAST_ROWS, BLOCK_ENTRIES // max(1, right.shape[1]))
    dots = torch.empty(count, dtype=torch.float64, device=x.device)
    with ieee_products():
        for begin in range(0, count, step):
            block = slice(begin, begin + step)
            dots[block] = product(left[block], matrix).mul_(right[block]).sum(1)
    return dots


def _sum_by_sample(dots: Tensor, offsets: Tensor) -> Tensor:
    """Sums over the rows of each sample, in fixed order: [N], [B + 1] -> [B]."""
    if dots.shape[0] == 0 or offsets.shape[0] == 1:
        return dots.new_zeros(offsets.shape[0] - 1)
    return torch.segment_reduce(dots, "sum", offsets=offsets.to(dots.device), initial=0)


@torch.library.custom_op("fillm_kernels::ghost_dot", mutates_args=())
def _op(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    _check(x, dy, v, offsets)
    host = check_offsets(offsets, x.shape[0])
    dots = select("ghost_dot", x.device, x.dtype)(x.detach(), dy.detach(), v.detach(), host)
    return dots.to(device=x.device, dtype=accumulation_dtype(x.dtype))


@_op.register_fake
def _(x: Tensor, dy: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    _check(x, dy, v, offsets)
    return x.new_empty(offsets.shape[0] - 1, dtype=accumulation_dtype(x.dtype))


register(
    "ghost_dot",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("ghost_dot"),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
