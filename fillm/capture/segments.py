"""Sums over the rows of a sample, in a fixed order on every device."""

import torch
from torch import Tensor


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each sample's rows: [N, ...] -> [B, ...]; the same bits whatever the order of calls."""
    count = offsets.numel() - 1
    rows = values.shape[0]
    if (
        count
        and rows % count == 0
        and torch.equal(offsets, torch.arange(count + 1, device=offsets.device) * (rows // count))
    ):
        return values.reshape(count, rows // count, *values.shape[1:]).sum(1)
    out = values.new_zeros(count, *values.shape[1:])
    return add_rows_(out, sample_of_row(offsets), values)


def sample_of_row(offsets: Tensor) -> Tensor:
    """[B + 1] -> [N], the sample that owns each row."""
    count = offsets.numel() - 1
    return torch.repeat_interleave(torch.arange(count, device=offsets.device), offsets.diff())


def add_rows_(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`out[index[r]] += rows[r]` in a fixed order on every device."""
    if out.device.type == "cpu":
        return out.index_add_(0, index, rows.to(out.dtype))
    # index_add_ on a GPU adds with atomics; accumulation through index_put_ sorts first and is deterministic.
    return out.index_put_((index,), rows.to(out.dtype), accumulate=True)
