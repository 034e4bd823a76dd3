"""`weighted_outer_`: add a weighted sum of per-sample weight gradients to a matrix.

    out += alpha * sum_b w_b G_b = alpha * (w[b(t)] dy_t)^T x    docs/method.md (6)

2 N I O FLOP: one weight-gradient product accumulated in place. The C++ product (csrc/cpu/matmul.cpp) skips and scales
rows as it packs them; torch's takes scaled copies of blocks of rows.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import as_tensor, check_memory, check_offsets, check_ragged, sample_of_row
from fillm_kernels.dispatch import Backend, register, select, triton_backend
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.products import ieee_products
from fillm_kernels.rows import nonzero_rows

WORTH_COPYING = 0.75  # leaving samples of weight zero out takes a copy of the others
BLOCK_ROWS = 4096  # rows scaled or widened at a time; each block reads and writes `out` once


def weighted_outer_(
    out: Tensor | Any,
    x: Tensor | Any,
    dy: Tensor | Any,
    weights: Tensor | Any | None,
    offsets: Tensor | Any,
    *,
    alpha: float = 1.0,
) -> Tensor:
    """Add a weighted sum of per-sample weight gradients to `out`, in place.

    out += alpha * sum_b weights_b G_b    docs/method.md (6)

    Args:
        out: the sum, [O, I], float32 | float64, no narrower than x; any strides (a transposed accumulator, a slice).
        x: layer inputs of all samples, packed, [N, I], float32 | bfloat16 | float16 | float64.
        dy: loss gradients at the layer's output, [N, O], same dtype and device.
        weights: one weight a sample, [B], any float dtype, or None for all ones.
        offsets: first row of each sample and N at the end, [B + 1], int64.
        alpha: factor of the whole sum.

    Returns:
        `out`, as a tensor; bfloat16 and float16 inputs are widened before they are multiplied. Samples of weight zero
        may be left out, so a NaN of theirs need not arrive.

    Raises:
        ShapeError: if sizes do not fit, offsets do not run from 0 to N, or `out` shares memory within itself or with
            another argument.
        DtypeError: if an argument is no array, or dtypes do not go together.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    out = as_tensor(out, "out", written=True)
    weights = None if weights is None else as_tensor(weights, "weights")
    _op(out, as_tensor(x, "x"), as_tensor(dy, "dy"), weights, as_tensor(offsets, "offsets"), alpha)
    return out


def _check(out: Tensor, x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor) -> None:
    check_ragged(x, dy, offsets)
    if out.ndim != 2 or out.shape[0] != dy.shape[1] or out.shape[1] != x.shape[1]:
        raise ShapeError(f"out must be [O, I] = [{dy.shape[1]}, {x.shape[1]}]; got {list(out.shape)}")
    if min(out.shape) > 0 and any(n > 1 and step == 0 for n, step in zip(out.shape, out.stride(), strict=True)):
        raise ShapeError("out is an expanded view whose entries share memory; pass a tensor with memory of its own")
    if out.dtype not in (torch.float32, torch.float64) or (x.dtype == torch.float64 and out.dtype != x.dtype):
        raise DtypeError(f"out must be float32 or float64 and no narrower than x ({x.dtype}); got {out.dtype}")
    if weights is not None and (weights.ndim != 1 or weights.shape[0] != offsets.shape[0] - 1):
        raise ShapeError(f"weights must be [B] = [{offsets.shape[0] - 1}]; got {list(weights.shape)}")
    if weights is not None and not weights.is_floating_point():
        raise DtypeError(f"weights must be floating; got {weights.dtype}")
    if out.device != x.device or (weights is not None and weights.device != x.device):
        raise DeviceError(f"out and weights must lie where x does, {x.device}")


def _reference(out: Tensor, x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor, alpha: float) -> None:
    """The definition, sample by sample, in float64, rounded once; the oracle of the tests. Adds to out [O, I]."""
    bounds = offsets.tolist()
    total = out.double()
    for sample, (begin, end) in enumerate(pairwise(bounds)):
        weight = alpha if weights is None else alpha * float(weights[sample])
        total = total + weight * (dy[begin:end].double().T @ x[begin:end].double())
    out.copy_(total)


def _torch(out: Tensor, x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor, alpha: float) -> None:
    """The weight-gradient product on torch's operators, on any device. Adds to out [O, I]."""
    scale = _row_weights(weights, offsets, out)
    if scale is not None:
        used = (scale != 0).squeeze(1)
        if float(used.sum()) < WORTH_COPYING * x.shape[0]:
            x, dy, scale = x[used], dy[used], scale[used]
    whole = scale is None and x.dtype == out.dtype
    step = max(1, x.shape[0] if whole else BLOCK_ROWS)
    with ieee_products():
        for begin in range(0, x.shape[0], step):
            block = slice(begin, begin + step)
            inside, outside = x[block].to(out.dtype), dy[block].to(out.dtype)
            if scale is not None:  # scale whichever is narrower
                if x.shape[1] <= dy.shape[1]:
                    inside = inside * scale[block]
                else:
                    outside = outside * scale[block]
            out.addmm_(outside.T, inside, alpha=alpha)


def _cpu(
    out: Tensor,
    x: Tensor,
    dy: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    alpha: float,
    instruction_set: str = "",
) -> None:
    """C++, without the rows of dy that are all zero and the samples of weight zero. Adds to out [O, I]."""
    scale = None if weights is None else weights.double()[sample_of_row(offsets, out.device)]
    rows = nonzero_rows(dy)
    if scale is not None and not bool(weights.all()):
        used = scale != 0 if rows is None else scale[rows] != 0
        rows = used.nonzero().squeeze(1) if rows is None else rows[used]
    native.extension.matmul_into(
        m=out.shape[0],
        n=out.shape[1],
        k=x.shape[0] if rows is None else rows.shape[0],
        a=native.address(dy.T),
        b=native.address(x),
        out=native.address(out),
        k_rows=0 if rows is None else rows.data_ptr(),
        k_scale=0 if scale is None else scale.data_ptr(),
        bias=0,
        alpha=alpha,
        accumulate=True,
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )


def _row_weights(weights: Tensor | None, offsets: Tensor, out: Tensor) -> Tensor | None:
    """Weights of samples [B] -> weights of rows [N, 1], in the dtype of `out`."""
    return None if weights is None else weights.to(out.dtype)[sample_of_row(offsets, out.device)][:, None]


@torch.library.custom_op("fillm_kernels::weighted_outer_", mutates_args=("out",))
def _op(out: Tensor, x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor, alpha: float) -> None:
    _check(out, x, dy, weights, offsets)
    check_memory({"out": out}, {"x": x, "dy": dy, "weights": weights, "offsets": offsets})
    host = check_offsets(offsets, x.shape[0])
    weights = None if weights is None else weights.detach()
    # A float64 sum is one in float64, however narrow the rows.
    dtype = out.dtype if out.dtype == torch.float64 else x.dtype
    select("weighted_outer_", x.device, dtype)(out.detach(), x.detach(), dy.detach(), weights, host, alpha)


@_op.register_fake
def _(out: Tensor, x: Tensor, dy: Tensor, weights: Tensor | None, offsets: Tensor, alpha: float) -> None:
    _check(out, x, dy, weights, offsets)


register(
    "weighted_outer_",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("weighted_outer"),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
