"""What is ranked: tensors, rows, attention heads or single weights; scores of all from `u` (docs/method.md)."""

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fillm.masks import TensorLayout, layout_table
from fillm.models import TensorInfo, head_layout
from fillm.statistics import Groups


def groups_of(model: nn.Module, scope: list[TensorInfo], granularity: str) -> dict[str, Groups]:
    """The groups of every tensor that has any at this granularity; empty for `tensor` and `element`.

    A row is one output neuron: a row of a linear weight, a column of GPT-2's transposed one, an entry of a vector; of a
    stack of experts, row `r` of expert `e` has index `e * rows + r`.
    """
    out: dict[str, Groups] = {}
    modules = dict(model.named_modules())
    for info in scope:
        if granularity == "row":
            transposed = isinstance(modules.get(info.module), Conv1D) and len(info.shape) == 2
            length = (
                info.shape[1] if transposed else info.numel if len(info.shape) < 2 else info.numel // info.shape[-1]
            )
            out[info.name] = Groups(1 if transposed else 0, torch.arange(length), length)
        elif granularity == "head" and (layout := head_layout(model, info)) is not None:
            out[info.name] = Groups(layout.axis if len(info.shape) > 1 else 0, layout.index, layout.num_heads)
    return out


def layouts_of(model: nn.Module, scope: list[TensorInfo], granularity: str) -> pa.Table:
    """Where the units of this granularity lie, for masks: the table of `fillm.masks.layout_table`."""
    groups = groups_of(model, scope, granularity)
    layouts = []
    for info in scope:
        if granularity in ("tensor", "element"):
            layouts.append((info.name, TensorLayout(info.shape)))
        elif (group := groups.get(info.name)) is not None:
            index = None if granularity == "row" else group.index
            layouts.append((info.name, TensorLayout(info.shape, group.axis, index)))
    return layout_table(layouts)


def sizes(update: Tensor, group: Groups | None, score: str) -> Tensor:
    """The size of `u` by group, or of all of it: l2 norm or mean absolute value, float64."""
    if group is None:
        flat = update.double().flatten()
        return (flat.norm() if score == "l2" else flat.abs().mean())[None]
    if score == "l2":
        return group.sum_entries(update.double().square()).sqrt()
    return group.sum_entries(update.abs()) / group.sum_entries(torch.ones_like(update))


def gains(forget_mean: Tensor, update: Tensor, group: Groups | None, element: bool = False) -> Tensor:
    """`-v . u` by group, of all, or of every weight, float64."""
    product = -(forget_mean.double() * update.double())
    if element:
        return product
    return product.sum()[None] if group is None else group.sum_entries(product)


def retain_changes(gain: Tensor, mean: Tensor, mean_square: Tensor, forget_rise: float = 0.01) -> Tensor:
    """The predicted change of the retain loss, equation (8), at the step that raises the forget loss by `forget_rise`.

    Args:
        gain: `-v . u`.
        mean: `mean_i(s_i)`.
        mean_square: `mean_i(s_i^2)`.
        forget_rise: nat per answer token.

    Returns:
        Nat per answer token; infinite where no step raises the forget loss.
    """
    eta = forget_rise / gain
    change = -eta * mean + 0.5 * eta.square() * mean_square
    return torch.where(gain > 0, change, torch.full_like(change, float("inf")))


def numels(info: TensorInfo, group: Groups | None) -> list[int]:
    """The number of weights of every group, or of the tensor."""
    if group is None:
        return [info.numel]
    shape = info.shape if len(info.shape) > 1 else (info.numel, 1)
    other = shape[-1] if group.axis == 0 else info.numel // shape[-1]
    return (torch.bincount(group.index, minlength=group.count) * other).tolist()
