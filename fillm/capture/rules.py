"""One rule per operation at which a parameter meets an activation (docs/method.md).

A rule receives the operation's arguments and answers with the operation's result, computed through a boundary that will
report `x` and `dy`; or with `NotImplemented`, and then the tensor is left to the exact batch-1 fallback.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fillm.capture.boundaries import LinearBoundary, LookupBoundary, ProductBoundary, ShiftBoundary
from fillm.capture.convolutions import convolution
from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients
from fillm.capture.interception import Tracked
from fillm.capture.joins import joined
from fillm.capture.rows import RowMap
from fillm.capture.segments import segment_sum
from fillm.capture.stacks import stacked, with_bias

Find = Callable[[Any], Tracked | None]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Of a model in `dtype`: float64 models still take norms and rotary angles in float32."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def rounded_to_zero(summed: Tensor, squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [B, ...], set to zero where they are the rounding noise of terms that cancel.

    A key bias without rotary positions, for one, has gradient zero in real arithmetic and noise in floating point; its
    score would divide noise by noise squared and come out on top. Independent terms add up to about the root of the sum
    of their squares, `squares` [B, ...]: a whole gradient a thousand roundings below that (1/64 in low precision) is no
    accident, nor is an entry (of the key rows of a fused bias) 512 roundings below: a small GPT-2 leaves noise of up to
    222 there and gradients from 1800 on, rotary positions some at 1000.
    """
    unit, size = unit_roundoff(dtype), squares.sqrt().to(summed.dtype)
    whole = summed.flatten(1).norm(dim=1) <= min(1024.0 * unit, 1.0 / 64.0) * size.flatten(1).norm(dim=1)
    entry = summed.abs() <= min(512.0 * unit, 1.0 / 256.0) * size
    return summed.masked_fill(whole.view(-1, *[1] * (summed.ndim - 1)) | entry, 0.0)


class Rules:
    """The rules bound to one batch.

    Args:
        rows: which activation rows belong to which sample.
        anchor: scalar that requires a gradient.
        used: called with a tensor's name at every use in the forward.
        deliver: called with (name, per-sample gradients) in the backward, once per use.
    """

    def __init__(self, rows: RowMap, anchor: Tensor, used: Callable[..., None], deliver: Callable[..., None]) -> None:
        self.rows, self.anchor, self.used, self.deliver = rows, anchor, used, deliver

    def __call__(self, name: str, func: Any, args: Any, kwargs: Any, find: Find) -> Any:
        """Dispatches on the operation's name."""
        if name not in _RULES:
            return NotImplemented
        try:
            bound = _SIGNATURES[name].bind(self, find, *args, **kwargs)
        except TypeError:  # a way of calling it that the rule does not know, such as `out=`
            return NotImplemented
        return _RULES[name](*bound.args, **bound.kwargs)

    def _linear(self, find: Find, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return self.affine(find, input, weight, bias, transposed=False)

    def _addmm(self, find: Find, bias: Tensor, input: Tensor, weight: Tensor, **scales: Any) -> Any:
        if find(input) or any(value != 1 for value in scales.values()):
            return NotImplemented
        return self.affine(find, input, weight, bias, transposed=True)

    def _matmul(self, find: Find, input: Tensor, weight: Tensor) -> Any:
        if find(input):  # `W x` of an activation whose last dimension is time
            if input.ndim != 2 or find(weight) or weight.ndim != 3:
                return NotImplemented
            y = self.affine(find, weight.transpose(1, 2), input, None, transposed=False)
            return NotImplemented if y is NotImplemented else y.transpose(1, 2)
        if weight.ndim == 3:
            return stacked(self, find, input, weight)
        return self.affine(find, input, weight, None, transposed=True)

    def affine(self, find: Find, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Any:
        """`x W^T + b` (`x W + b` if `transposed`), each of `W` and `b` tracked or not."""
        matrix, shift = find(weight), find(bias)
        offsets = self.rows.row_offsets(x.shape[:-1])
        if offsets is None or not self.rows.holds_tokens(x.shape[:-1]) or find(x) or weight.ndim != 2 or x.ndim < 2:
            return NotImplemented
        if any(operand is not None and operand.requires_grad for operand in (weight, bias)):
            return NotImplemented  # one that is an activation itself, such as the residual in `addmm(residual, x, W)`
        if matrix is not None and not (matrix.is_parameter or matrix.transposed):
            return NotImplemented
        if shift is not None and (shift.value.ndim != 1):
            return NotImplemented
        stored_transposed = transposed != (matrix is not None and matrix.transposed)

        def site(x: Tensor, dy: Tensor) -> None:
            rows, grads = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            if matrix is not None:
                self.deliver(matrix.name, OuterGradients(rows, grads, offsets, stored_transposed))
            if shift is not None:
                self.deliver(shift.name, self.shift_gradients(shift, grads, offsets))

        for record in (matrix, shift):
            if record is not None:
                self.used(record.name)
        return LinearBoundary.apply(self.anchor, x, weight, bias, transposed, site)

    def shift_gradients(self, shift: Tracked, dy: Tensor, offsets: Tensor) -> DenseGradients:
        """Per-sample gradients of a bias: `sum_t dy_t`, or zero where that is rounding noise."""
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
        squares = segment_sum(wide.square(), offsets)
        return DenseGradients(shift.to_parameter(rounded_to_zero(segment_sum(wide, offsets), squares, dy.dtype)))

    def _embedding(
        self,
        find: Find,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        record = find(weight)
        if record is None or not record.is_parameter or max_norm is not None or scale_grad_by_freq or sparse:
            return NotImplemented
        ids = input
        tokens, samples = self.rows.num_tokens, self.rows.num_samples
        if not self.rows.packed and ids.ndim == 2 and ids.shape[0] == 1 and samples > 1:
            # Positions shared by the batch: one row a sample, so that each keeps its own gradient.
            ids = ids.expand(samples, -1)
        offsets = self.rows.row_offsets(ids.shape)
        if offsets is None or ids.numel() % tokens:
            return NotImplemented

        def site(ids: Tensor, dy: Tensor) -> None:
            flat, grads = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
            if padding_idx is not None:
                grads = grads.masked_fill((flat == padding_idx % weight.shape[0])[:, None], 0.0)
            self.deliver(record.name, LookupGradients(flat, grads, offsets, weight.shape[0]))

        self.used(record.name)
        return LookupBoundary.apply(self.anchor, ids, weight, site)

    def _rows(self, find: Find, weight: Tensor, ids: Tensor) -> Any:
        """`W[ids]`: a lookup by indices, one row for every token."""
        if ids.dtype not in (torch.int64, torch.int32) or weight.ndim != 2 or not self.rows.holds_tokens(ids.shape):
            return NotImplemented
        return self._embedding(find, ids, weight)

    def _product(self, find: Find, left: Any, right: Any) -> Any:
        h, w = (right, left) if find(left) else (left, right)
        record = self._broadcast(find, h, w)
        if record is None:
            return NotImplemented

        def site(h: Tensor, dy: Tensor) -> None:
            wide = torch.promote_types(torch.promote_types(h.dtype, dy.dtype), torch.float32)
            summed = self.rows.sum_by_sample(h.to(wide) * dy.to(wide), _broadcast_shape(w))
            self.deliver(record.name, DenseGradients(record.to_parameter(summed.view(-1, *w.shape))))

        self.used(record.name)
        return ProductBoundary.apply(self.anchor, h, w, site)

    def _shift(self, find: Find, left: Any, right: Any, alpha: float = 1.0) -> Any:
        h, w = (right, left) if find(left) else (left, right)
        return NotImplemented if alpha != 1 else self._shifted(find, h, w, 1)

    def _less(self, find: Find, left: Any, right: Any, alpha: float = 1.0) -> Any:
        """`h - w`."""
        return NotImplemented if alpha != 1 or find(left) else self._shifted(find, left, right, -1)

    def _shifted(self, find: Find, h: Any, w: Any, sign: int) -> Any:
        record = self._broadcast(find, h, w)
        if record is None:
            return NotImplemented

        def site(dy: Tensor) -> None:
            wide = sign * dy.to(torch.promote_types(dy.dtype, torch.float32))
            shape = _broadcast_shape(w)
            squares = self.rows.sum_by_sample(wide.square(), shape)
            summed = rounded_to_zero(self.rows.sum_by_sample(wide, shape), squares, dy.dtype)
            self.deliver(record.name, DenseGradients(record.to_parameter(summed.view(-1, *w.shape))))

        self.used(record.name)
        return ShiftBoundary.apply(self.anchor, h, w if sign > 0 else -w, site)

    def _broadcast(self, find: Find, h: Any, w: Any) -> Tracked | None:
        """The record of `w` if `h` is an activation of known rows to whose last dimensions `w` broadcasts."""
        record = find(w)
        if record is None or not isinstance(h, Tensor) or find(h) is not None or w.ndim < 1 or h.ndim < w.ndim:
            return None
        width = len(_broadcast_shape(w))
        lead = h.shape[: h.ndim - width]
        # Rows of one dimension may be several a token: heads, each normed by itself.
        rows = self.rows.holds_tokens(h.shape[:-1]) or (h.ndim == 2 and h.shape[0] % self.rows.num_tokens == 0)
        if not lead or not rows:
            return None
        fits = all(1 in (a, b) or a == b for a, b in zip(w.shape[w.ndim - width :], h.shape[len(lead) :], strict=True))
        return record if fits and self.rows.row_offsets(lead) is not None else None

    def _layer_norm(
        self,
        find: Find,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Any:
        if find(input) is not None:
            return NotImplemented
        return self._scaled(find, F.layer_norm(input, normalized_shape, None, None, eps), weight, bias)

    def _rms_norm(
        self, find: Find, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Any:
        if find(input) is not None:
            return NotImplemented
        return self._scaled(find, F.rms_norm(input, normalized_shape, None, eps), weight, None)

    def _scaled(self, find: Find, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
        """`y * weight + bias` through the boundaries of whichever is tracked."""
        for operand, rule, plain in ((weight, self._product, torch.mul), (bias, self._shift, torch.add)):
            if operand is not None:
                y = rule(find, y, operand) if find(operand) is not None else plain(y, operand)
                if y is NotImplemented:
                    return NotImplemented
        return y


def _broadcast_shape(w: Tensor) -> torch.Size:
    """The dimensions of `w` from the first that is not 1 on: what precedes them is broadcast like what is missing."""
    first = next((axis for axis, size in enumerate(w.shape) if size != 1), w.ndim - 1)
    return w.shape[first:]


_RULES: dict[str, Callable[..., Any]] = {
    "linear": Rules._linear,
    "addmm": Rules._addmm,
    "matmul": Rules._matmul,
    "mm": Rules._matmul,
    "embedding": Rules._embedding,
    "getitem": Rules._rows,
    "mul": Rules._product,
    "rmul": Rules._product,
    "add": Rules._shift,
    "radd": Rules._shift,
    "sub": Rules._less,
    "layer_norm": Rules._layer_norm,
    "rms_norm": Rules._rms_norm,
    "conv1d": convolution,
    "bmm": stacked,
    "baddbmm": with_bias,
    "cat": joined,
}
_SIGNATURES = {name: inspect.signature(rule) for name, rule in _RULES.items()}
