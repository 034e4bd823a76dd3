"""Rows of `dy` that are entirely zero (prompt tokens at the vocabulary head) take part in no product."""

import torch
from torch import Tensor

from fillm_kernels import native

WORTH_SKIPPING = 0.95  # finding rows one by one pays once at least this fraction of a product is saved


def nonzero_rows(dy: Tensor) -> Tensor | None:
    """Rows of a CPU tensor that hold anything but zeros, where skipping the others pays.

    Args:
        dy: [N, O], any float type, on the CPU.

    Returns:
        Ascending row numbers, int64, or None if so many rows are in use that all should be taken as they are. A NaN is
        not a zero.
    """
    rows, width = dy.shape
    if native.extension is None or rows == 0 or width == 0 or dy.stride(1) != 1:
        return None
    flags = torch.empty(rows, dtype=torch.bool)
    native.extension.nonzero_rows(
        dy.data_ptr(), dy.stride(0), rows, width, dy.element_size(), flags.data_ptr(), torch.get_num_threads()
    )
    used = flags.nonzero().flatten()
    return used if used.shape[0] <= WORTH_SKIPPING * rows else None
