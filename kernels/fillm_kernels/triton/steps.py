"""Host side of `sample_moments` on Triton: which rows a program takes in which step, and how long samples are cut.

What a sample's rows are cut into depends on its own length and the layer's size alone, so its bits do not depend on the
other samples of a call.
"""

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# A layer of so few tiles leaves the machine idle if one program takes all rows of a sample that is longer than a part:
# (tiles at most, rows of a part at least). 264 programs fill two to a multiprocessor of the largest GPUs.
FEW_TILES = ((64, 512), (264, 2048))
MOST_PARTS = 32  # of a sample
PART_ENTRIES = 1 << 24  # of all parts at a time, 64 MiB, unless one sample takes more


def part_rows(tiles: int, length: int) -> int:
    """Rows of a part of a sample of `length` rows, at a layer of `tiles` tiles; `length` if it is not cut."""
    for most, rows in FEW_TILES:
        if tiles <= most and length > rows:
            return max(rows, -(-length // MOST_PARTS))
    return length


@lru_cache(maxsize=16)  # the layers of one batch ask with the same offsets
def plan(bounds: tuple[int, ...], block: int, groups: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Steps of at most `block` rows of one sample, and how they are dealt out; without the samples that are cut.

    Returns:
        [steps, 3], first row, end, the sample if it ends here, else -1 (an empty sample has one step of no rows);
        [groups + 1], the first step of every group, each of which begins with a sample. int64, on the host.
    """
    steps, firsts = [], []
    for sample, (begin, end) in enumerate(pairwise(bounds)):
        if part_rows(tiles, end - begin) < end - begin:
            continue
        firsts.append(len(steps))
        for first in range(begin, max(end, begin + 1), block):
            steps.append((first, min(first + block, end), sample if first + block >= end else -1))
    firsts.append(len(steps))
    shares = (len(steps) * group // groups for group in range(groups + 1))
    starts = [firsts[bisect_left(firsts, share)] for share in shares]
    return torch.tensor(steps, dtype=torch.int64).reshape(-1, 3), torch.tensor(starts, dtype=torch.int64)


def plan_parts(bounds: tuple[int, ...], tiles: int, entries: int) -> Iterator[Tensor]:
    """The samples that are cut, some at a time.

    Args:
        bounds: offsets, [B + 1].
        tiles: tiles of the layer.
        entries: entries of one part, O I.

    Yields:
        [parts, 3]: first row and end of every part, the sample if it ends here, else -1. int64, on the host.
    """
    pending: list[tuple[int, int, int]] = []
    for sample, (begin, end) in enumerate(pairwise(bounds)):
        rows = part_rows(tiles, end - begin)
        if rows == end - begin:
            continue
        parts = [(first, min(first + rows, end), sample if first + rows >= end else -1)
                 for first in range(begin, end, rows)]  # fmt: skip
        if pending and (len(pending) + len(parts)) * entries > PART_ENTRIES:
            yield torch.tensor(pending, dtype=torch.int64)
            pending = []
        pending += parts
    if pending:
        yield torch.tensor(pending, dtype=torch.int64)
