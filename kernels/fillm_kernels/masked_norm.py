"""`masked_norm`: the gradient norm of the weights in a mask, all tensors together, for clipping.

    sqrt( sum_tensors sum_{i in mask} g_i^2 )    docs/method.md section 6

Weights outside the mask are not read where a whole block of 2048 lies outside, and never count: a NaN there is no NaN
here. Squares are added in float64, in an order that depends on sizes and mask alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import FLOATS, as_tensor
from fillm_kernels.dispatch import Backend, register, select_each, triton_backend
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.selection import (
    Places,
    Selection,
    as_selection,
    check_selection,
    chosen_indices,
    extension_numbers,
    packed,
    unpacked,
)


def masked_norm(
    grads: Tensor | Sequence[Tensor] | Any, masks: Selection | Tensor | Sequence[Selection | Tensor] | Any
) -> Tensor:
    """Norm of the masked part of one gradient, or of several together.

    Args:
        grads: gradient of any shape, or a list of them on one device, float32 | bfloat16 | float16 | float64.
        masks: its mask, or a list of as many: a `Selection`, bits [ceil(P / 8)] uint8, or rows [R] int64. Bits and
            rows are turned into a selection at every call; make the selection once where calls repeat.

    Returns:
        Scalar, float64, on the device of the gradients; 0 for empty masks. For `clip`:
        `(max_norm / (norm + 1e-6)).clamp(max=1)`.

    Raises:
        ShapeError, DtypeError, DeviceError: if a mask does not belong to its gradient.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    if not isinstance(grads, (list, tuple)):
        grads, masks = [grads], [masks]
    if not grads or len(grads) != len(masks):
        raise ShapeError(f"grads and masks must be lists of the same length, not empty; got {len(grads)}, {len(masks)}")
    grads = [as_tensor(grad, f"grads[{t}]").detach() for t, grad in enumerate(grads)]
    return _op(grads, *packed([as_selection(mask, grad) for mask, grad in zip(masks, grads, strict=True)])).sqrt()


def _check(grads: Sequence[Tensor], places: Sequence[Places]) -> None:
    for grad, own in zip(grads, places, strict=True):
        if grad.dtype not in FLOATS:
            raise DtypeError(f"a gradient must be float32, float64, bfloat16 or float16; got {grad.dtype}")
        if grad.device != grads[0].device:
            raise DeviceError("gradients of one norm must lie on one device; take a norm for each")
        check_selection(grad, own)


def _reference(grad: Tensor, places: Places) -> Tensor:
    """The definition in float64; the oracle of the tests. Any shape -> scalar."""
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for _, at in chosen_indices(places):
        total += grad.flatten()[at].double().square().sum()
    return total


def _torch(grad: Tensor, places: Places) -> Tensor:
    """Torch's operators, block by block, on any device. Any shape -> scalar, float64."""
    flat = grad.contiguous().flatten()
    shares = [flat[at].double().square().sum() for _, at in chosen_indices(places)]
    return torch.stack(shares).sum() if shares else torch.zeros((), dtype=torch.float64, device=grad.device)


def _cpu(grad: Tensor, places: Places, instruction_set: str = "") -> Tensor:
    """C++ (csrc/cpu/masked_step.cpp). Any shape -> scalar, float64."""
    flat = grad.contiguous()
    squares = native.extension.masked_squares(
        grad=flat.data_ptr(),
        dtype=native.DTYPE_CODES[str(flat.dtype).removeprefix("torch.")],
        selected=extension_numbers(places),
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    return torch.tensor(squares, dtype=torch.float64)


@torch.library.custom_op("fillm_kernels::masked_squares", mutates_args=())
def _op(grads: Sequence[Tensor], masks: Sequence[Tensor], starts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    places = unpacked(masks, starts, sizes)
    _check(grads, places)
    runs = select_each("masked_norm", grads)
    return sum(run(grad, own) for run, grad, own in zip(runs, grads, places, strict=True))


@_op.register_fake
def _(grads: Sequence[Tensor], masks: Sequence[Tensor], starts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    _check(grads, unpacked(masks, starts, sizes))
    return grads[0].new_empty((), dtype=torch.float64)


register(
    "masked_norm",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("masked_norm", dtypes=()),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
