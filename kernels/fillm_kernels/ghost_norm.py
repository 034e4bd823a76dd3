"""`ghost_norm`: squared norms of per-sample weight gradients without forming one.

    |dy_b^T x_b|_F^2 = sum_{t,s in b} (x_t . x_s)(dy_t . dy_s)    docs/method.md (4); Goodfellow 2015, arXiv 1510.01799

Two forms of the same number. Gram: T_b^2 (I + O) FLOP, the two Gram matrices taken tile by tile, pairs s < t counted
twice. Explicit: 2 T_b I O FLOP, the gradient itself tile by tile, for samples longer than 2 I O / (I + O). Either way
no T_b x T_b and no O x I matrix is stored whole. A row of `dy` that is all zero contributes nothing and is not visited,
whatever stands in its row of `x`.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import accumulation_dtype, as_tensor, check_offsets, check_ragged
from fillm_kernels.dispatch import Backend, register, select, triton_backend
from fillm_kernels.errors import ShapeError
from fillm_kernels.products import ieee_products, product

FORMS = ("auto", "gram", "explicit")
BLOCK_ENTRIES = 1 << 24  # entries of any intermediate of the torch backend: 64 MiB in float32


def ghost_norm(x: Tensor | Any, dy: Tensor | Any, offsets: Tensor | Any, *, form: str = "auto") -> Tensor:
    """Squared Frobenius norm of every per-sample weight gradient, without forming one.

    |dy_b^T x_b|^2 = sum_{t,s} (x_t . x_s)(dy_t . dy_s)    docs/method.md (4); Goodfellow 2015, arXiv 1510.01799

    Args:
        x: layer inputs of all samples, packed, [N, I], float32 | bfloat16 | float16 | float64.
        dy: loss gradients at the layer's output, [N, O], same dtype and device.
        offsets: first row of each sample and N at the end, [B + 1], int64.
        form: `gram`, `explicit`, or `auto`, whichever takes fewer FLOPs for each sample.

    Returns:
        [B], float32 (float64 for float64 inputs), in squared loss per unit of weight; not differentiable.

    Raises:
        ShapeError: if N differs, offsets do not run from 0 to N, or `form` is unknown.
        DtypeError: if an argument is no array, or dtypes differ or are not floating.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    if form not in FORMS:
        raise ShapeError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    return _op(as_tensor(x, "x"), as_tensor(dy, "dy"), as_tensor(offsets, "offsets"), form)


def _reference(x: Tensor, dy: Tensor, offsets: Tensor, form: str) -> Tensor:
    """The definition, sample by sample, in float64; the oracle of the tests. [N, I], [N, O], [B + 1] -> [B]."""
    bounds = offsets.tolist()
    norms = [(dy[begin:end].double().T @ x[begin:end].double()).square().sum() for begin, end in pairwise(bounds)]
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)


def _cpu(x: Tensor, dy: Tensor, offsets: Tensor, form: str, instruction_set: str = "") -> Tensor:
    """C++ (csrc/cpu/ghost_norm.cpp). [N, I], [N, O], [B + 1] on the CPU -> [B], float64."""
    x, dy = (t if t.stride(1) == 1 else t.contiguous() for t in (x, dy))
    norms = torch.empty(offsets.shape[0] - 1, dtype=torch.float64)
    native.extension.ghost_norm(
        x=x.data_ptr(),
        x_stride=x.stride(0),
        inputs=x.shape[1],
        dy=dy.data_ptr(),
        dy_stride=dy.stride(0),
        outputs=dy.shape[1],
        offsets=offsets.data_ptr(),
        samples=norms.shape[0],
        norms=norms.data_ptr(),
        dtype=native.DTYPE_CODES[str(x.dtype).removeprefix("torch.")],
        form=FORMS.index(form),
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    return norms


def _torch(x: Tensor, dy: Tensor, offsets: Tensor, form: str) -> Tensor:
    """Torch's operators on any device: padded groups of samples, or blocks of G_b. [N, I], [N, O], [B + 1] -> [B]."""
    bounds = offsets.tolist()
    samples, inputs, outputs = len(bounds) - 1, x.shape[1], dy.shape[1]
    norms = torch.zeros(samples, dtype=torch.float64, device=x.device)
    first = 0
    while first < samples:
        length = bounds[first + 1] - bounds[first]
        longer = length * (inputs + outputs) > 2 * inputs * outputs
        if form == "explicit" or (form == "auto" and longer):
            norms[first] = _explicit(x[bounds[first] : bounds[first + 1]], dy[bounds[first] : bounds[first + 1]])
            first += 1
            continue
        last = _group_end(bounds, first, max(inputs, outputs))
        norms[first:last] = _grams(x, dy, bounds[first : last + 1])
        first = last
    return norms


def _group_end(bounds: list[int], first: int, width: int) -> int:
    """End of the run of samples from `first` whose padded copies and Gram matrices stay within BLOCK_ENTRIES."""
    longest, last = bounds[first + 1] - bounds[first], first + 1
    while last < len(bounds) - 1:
        longer = max(longest, bounds[last + 1] - bounds[last])
        # A neighbour of very different length would be mostly padding.
        if (last + 1 - first) * longer * max(longer, width) > BLOCK_ENTRIES or longer > 2 * longest:
            break
        longest, last = longer, last + 1
    return last


def _grams(x: Tensor, dy: Tensor, bounds: list[int]) -> Tensor:
    """Gram form of samples next to each other: x [N, I], dy [N, O], their bounds [b + 1] -> [b], float64."""
    offsets = torch.tensor(bounds, device=x.device)
    lengths = offsets.diff()
    longest = int(max(end - begin for begin, end in pairwise(bounds)))
    step = torch.arange(longest, device=x.device)
    padding = step >= lengths[:, None]  # [b, T]
    rows = (offsets[:-1, None] + step).masked_fill(padding, 0)
    inside = x[rows].masked_fill(padding[..., None], 0)  # [b, T, I]
    outside = dy[rows].masked_fill(padding[..., None], 0)  # [b, T, O]
    block = max(1, BLOCK_ENTRIES // max(1, len(lengths) * longest))
    total = torch.zeros(len(lengths), dtype=torch.float64, device=x.device)
    with ieee_products():
        for begin in range(0, longest, block):
            end = min(begin + block, longest)
            for start, weight in ((0, 2.0), (begin, 1.0)):  # pairs below the diagonal block, then the block itself
                stop = begin if weight == 2.0 else end
                pairs = product(inside[:, begin:end], inside[:, start:stop].mT)  # [b, t, s]
                pairs = pairs * product(outside[:, begin:end], outside[:, start:stop].mT)
                total += weight * pairs.sum((1, 2), dtype=torch.float64)
    return total


def _explicit(x: Tensor, dy: Tensor) -> Tensor:
    """Explicit form of one sample: x [T, I], dy [T, O] -> scalar, float64; G_b in blocks of rows."""
    block = max(1, BLOCK_ENTRIES // max(1, x.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    with ieee_products():
        for begin in range(0, dy.shape[1], block):
            total += product(dy[:, begin : begin + block].T, x).square().sum(dtype=torch.float64)
    return total


@torch.library.custom_op("fillm_kernels::ghost_norm", mutates_args=())
def _op(x: Tensor, dy: Tensor, offsets: Tensor, form: str) -> Tensor:
    check_ragged(x, dy, offsets)
    host = check_offsets(offsets, x.shape[0])
    norms = select("ghost_norm", x.device, x.dtype)(x.detach(), dy.detach(), host, form)
    return norms.to(device=x.device, dtype=accumulation_dtype(x.dtype))


@_op.register_fake
def _(x: Tensor, dy: Tensor, offsets: Tensor, form: str) -> Tensor:
    check_ragged(x, dy, offsets)
    return x.new_empty(offsets.shape[0] - 1, dtype=accumulation_dtype(x.dtype))


register(
    "ghost_norm",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("ghost_norm"),
    torch=Backend(_torch),
    reference=Backend(_reference),
)
