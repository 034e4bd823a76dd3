"""`soir_sweep`: DataInf's closed form from sketches of per-sample gradients, in one read of the store.

    lambda = damping * mean_i(q_i) / P        c_i = d_i / (lambda + q_i),  d_i = <s_i, v>        docs/method.md (1), (2)
    u = -(1/lambda) (v - (1/n) w),            w = sum_i c_i s_i,           score = |u|           (2), (3)

P is the tensor's true size, q_i the exact squared norms (section 5): a sketch serves the inner products alone. Source:
Kwon et al., DataInf, arXiv 2310.00902. lambda is known before the sweep, so a few rows at a time are read, multiplied
with v, weighted and added while they lie in the cache. Each part of the rows has an accumulator of its own, added in
order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import FLOATS, accumulation_dtype, as_integer, as_tensor
from fillm_kernels.dispatch import Backend, register, select, triton_backend
from fillm_kernels.errors import DeviceError, DtypeError, ShapeError
from fillm_kernels.products import ieee_products, product

BLOCK_ENTRIES = 1 << 22  # entries of the store that the torch backend takes at a time


class SoirSweep(NamedTuple):
    """What one sweep gives; [L] stands for the leading dimension of the store, absent if the store has none.

    Attributes:
        dots: d_i = <s_i, v>, [L, n], float32 (float64 for float64 sketches).
        weighted: w = sum_i c_i s_i, [L, k], dtype of `dots`.
        damping: lambda of (1), [L], float64, like all that follows.
        cross: S = (1/n) sum_i c_i d_i, [L].
        score: |u| of (3), [L]; 0 where lambda and v are 0, infinity where lambda alone is.
        gain: -v . u, the predicted forget gain, [L]; 0 and infinity likewise.
    """

    dots: Tensor
    weighted: Tensor
    damping: Tensor
    cross: Tensor
    score: Tensor
    gain: Tensor


def soir_sweep(
    s: Tensor | Sequence[Tensor] | Any,
    v: Tensor | Sequence[Tensor] | Any,
    norms: Tensor | Sequence[Tensor] | Any,
    damping: float,
    *,
    numel: int | Sequence[int] | None = None,
    v_norm: Tensor | Sequence[Tensor] | Any | None = None,
) -> SoirSweep | list[SoirSweep]:
    """Dots, weighted sum and score of one tensor, of a stack, or of a list of tensors with different sizes.

    Args:
        s: sketches of retain gradients, [n, k] or [L, n, k], float32 | bfloat16 | float16 | float64; rows that lie
            apart are copied. Or a list of such tensors; then all arguments but `damping` are lists.
        v: sketch of the mean forget gradient, [k] or [L, k], dtype of `s` or wider.
        norms: exact squared norms q_i of the unsketched gradients, [n] or [L, n], float32 | float64.
        damping: factor of the mean curvature in lambda, 0.1 as a rule; not negative.
        numel: true size P of the tensor, or of each of the L. None means k: right only if `s` are the gradients
            themselves; with sketches it scales every score by k / P (docs/method.md section 5).
        v_norm: exact |v|, scalar or [L], in the place of the sketch's; the score is 0 where noise of the sketch makes
            its square negative.

    Returns:
        A `SoirSweep`, or a list of them.

    Raises:
        ShapeError: if sizes do not fit or `damping` is negative.
        DtypeError, DeviceError: if dtypes or devices do not go together.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    if isinstance(s, (list, tuple)):
        columns = [v, norms, *([None] * len(s) if one is None else one for one in (numel, v_norm))]
        lengths = [len(column) if isinstance(column, (list, tuple)) else None for column in columns]
        if any(length != len(s) for length in lengths):
            raise ShapeError(f"s is a list: all but damping must be lists of its length, {len(s)}; got {lengths}")
        rows = zip(s, *columns, strict=True)
        return [soir_sweep(a, b, q, damping, numel=size, v_norm=norm) for a, b, q, size, norm in rows]
    s, v, norms = as_tensor(s, "s"), as_tensor(v, "v"), as_tensor(norms, "norms")
    if s.ndim not in (2, 3):
        raise ShapeError(f"s must be [n, k] or [L, n, k]; got {list(s.shape)}")
    single = s.ndim == 2
    if single:
        s, v, norms = s[None], v[None], norms[None]
    sizes = numel if isinstance(numel, (list, tuple)) else [s.shape[2] if numel is None else numel]
    sizes = [as_integer(size, "numel") for size in sizes]
    sizes = sizes * s.shape[0] if len(sizes) == 1 else sizes
    dots, weighted, pieces = _op(s, v, norms, damping, sizes)
    lam, cross, rest, square = pieces.unbind(1)
    if v_norm is not None:
        exact = _exact_norms(v_norm, s).square()
        rest, square = (rest + exact - square).clamp(min=0), exact.expand_as(square)
    flat = torch.where(square == 0, 0.0, torch.inf)
    score = torch.where(lam == 0, flat, rest.sqrt() / lam)
    gain = torch.where(lam == 0, flat, (square - cross) / lam)
    result = (dots, weighted, lam, cross, score, gain)
    return SoirSweep(*(part[0] for part in result)) if single else SoirSweep(*result)


def _exact_norms(v_norm: Tensor | Any, s: Tensor) -> Tensor:
    """`v_norm` as [L] or [1], float64, where the store [L, n, k] lies."""
    norms = torch.full((), v_norm) if isinstance(v_norm, (int, float)) else as_tensor(v_norm, "v_norm")
    if norms.numel() not in (1, s.shape[0]) or norms.ndim > 1:
        raise ShapeError(f"v_norm must be a scalar or [L] = [{s.shape[0]}]; got {list(norms.shape)}")
    if not norms.is_floating_point():
        raise DtypeError(f"v_norm must be floating; got {norms.dtype}")
    return norms.detach().to(device=s.device, dtype=torch.float64).reshape(-1)


def _check(s: Tensor, v: Tensor, norms: Tensor, damping: float, numel: Sequence[int]) -> None:
    tensors, rows, k = s.shape
    if v.shape != (tensors, k) or norms.shape != (tensors, rows) or len(numel) != tensors:
        raise ShapeError(
            f"s [L, n, k] = {[tensors, rows, k]} needs v [L, k], norms [L, n] and L sizes; "
            f"got {list(v.shape)}, {list(norms.shape)} and {len(numel)}"
        )
    if damping < 0 or any(size < 1 for size in numel):
        raise ShapeError(f"damping must not be negative, nor numel below 1; got {damping} and {list(numel)}")
    if s.dtype not in FLOATS or v.dtype not in (s.dtype, torch.float32, torch.float64):
        raise DtypeError(f"s and v must be floating, v no narrower than s; got {s.dtype} and {v.dtype}")
    if norms.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"norms must be float32 or float64; got {norms.dtype}")
    if v.device != s.device or norms.device != s.device:
        raise DeviceError(f"v and norms must lie where s does, {s.device}; got {v.device} and {norms.device}")


def damping_of(norms: Tensor, damping: float, numel: Sequence[int]) -> Tensor:
    """The damping of (1): [L, n], float64 -> [L]; 0 without samples."""
    if norms.shape[1] == 0:
        return norms.new_zeros(norms.shape[0])
    return damping * norms.mean(1) / torch.tensor(numel, dtype=torch.float64, device=norms.device)


def _reference(s: Tensor, v: Tensor, norms: Tensor, damping: float, numel: Sequence[int]) -> tuple[Tensor, ...]:
    """The definition in float64; the oracle of the tests. [L, n, k], [L, k], [L, n] -> [L, n], [L, k], [L, 4]."""
    s, v, q, n = s.double(), v.double(), norms.double(), s.shape[1]
    lam = q.new_tensor([damping * float(row.sum()) / max(n, 1) / size for row, size in zip(q, numel, strict=True)])
    dots, weighted, pieces = torch.zeros_like(q), torch.zeros_like(v), q.new_zeros(len(s), 4)
    for t in range(len(s)):
        for i in range(n):
            dots[t, i] = d = (s[t, i] * v[t]).sum()
            c = d / (lam[t] + q[t, i]) if lam[t] + q[t, i] != 0 or d != 0 else d
            weighted[t] += c * s[t, i]
            pieces[t, 1] += c * d / n
        pieces[t, 0] = lam[t]
        pieces[t, 2] = (v[t] - weighted[t] / max(n, 1)).square().sum()
        pieces[t, 3] = v[t].square().sum()
    return dots, weighted, pieces


def _cpu(
    s: Tensor, v: Tensor, norms: Tensor, damping: float, numel: Sequence[int], instruction_set: str = ""
) -> tuple[Tensor, ...]:
    """C++ (csrc/cpu/soir_sweep.cpp). [L, n, k], [L, k], [L, n] -> [L, n], [L, k], [L, 4]."""
    s, v = s.contiguous(), v.to(accumulation_dtype(s.dtype)).contiguous()
    sizes = torch.tensor(numel, dtype=torch.float64)
    dots, weighted = torch.empty(s.shape[:2], dtype=v.dtype), torch.empty_like(v)
    pieces = torch.empty(s.shape[0], 4, dtype=torch.float64)
    native.extension.soir_sweep(
        s=s.data_ptr(),
        v=v.data_ptr(),
        norms=norms.data_ptr(),
        numel=sizes.data_ptr(),
        damping=damping,
        tensors=s.shape[0],
        rows=s.shape[1],
        k=s.shape[2],
        dots=dots.data_ptr(),
        weighted=weighted.data_ptr(),
        pieces=pieces.data_ptr(),
        dtype=native.DTYPE_CODES[str(s.dtype).removeprefix("torch.")],
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    return dots, weighted, pieces


def on_torch(s: Tensor, v: Tensor, norms: Tensor, damping: float, numel: Sequence[int]) -> tuple[Tensor, ...]:
    """Torch's operators on blocks of rows, on any device. [L, n, k], [L, k], [L, n] -> [L, n], [L, k], [L, 4]."""
    tensors, rows, k = s.shape
    wide = accumulation_dtype(s.dtype)
    v = v.to(wide)
    lam = damping_of(norms, damping, numel)
    curvature = lam[:, None] + norms
    dots = torch.zeros(tensors, rows, dtype=wide, device=s.device)
    coefficients = torch.zeros_like(curvature)
    weighted = torch.zeros(tensors, k, dtype=torch.float64, device=s.device)
    step = max(1, BLOCK_ENTRIES // max(1, tensors * k))
    with ieee_products():
        for begin in range(0, rows, step):
            block = slice(begin, begin + step)
            part = s[:, block].to(wide)
            d = product(part, v[:, :, None])[:, :, 0]
            c = d.double() / curvature[:, block]
            c = torch.where((curvature[:, block] == 0) & (d == 0), 0.0, c)
            dots[:, block], coefficients[:, block] = d, c
            weighted += product(c.to(wide)[:, None], part)[:, 0]
    n = max(rows, 1)
    cross = (coefficients * dots).sum(1) / n
    rest = (v.double() - weighted / n).square().sum(1)
    return dots, weighted.to(wide), torch.stack([lam, cross, rest, v.double().square().sum(1)], 1)


@torch.library.custom_op("fillm_kernels::soir_sweep", mutates_args=())
def _op(s: Tensor, v: Tensor, norms: Tensor, damping: float, numel: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    _check(s, v, norms, damping, numel)
    run = select("soir_sweep", s.device, s.dtype)
    dots, weighted, pieces = run(s.detach(), v.detach(), norms.detach().double().contiguous(), damping, numel)
    wide = accumulation_dtype(s.dtype)
    return dots.to(wide), weighted.to(wide), pieces


@_op.register_fake
def _(s: Tensor, v: Tensor, norms: Tensor, damping: float, numel: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    _check(s, v, norms, damping, numel)
    wide = accumulation_dtype(s.dtype)
    shapes = ((s.shape[:2], wide), ((s.shape[0], s.shape[2]), wide), ((s.shape[0], 4), torch.float64))
    dots, weighted, pieces = (s.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return dots, weighted, pieces


register(
    "soir_sweep",
    cpu=Backend(_cpu, devices=("cpu",), needs_extension=True),
    triton=triton_backend("soir_sweep", dtypes=()),
    torch=Backend(on_torch),
    reference=Backend(_reference),
)
