"""Where a ranking's units lie in their tensors: what turns chosen rows and heads into masks without the model.

A ranking keeps it as a table: `name`, `shape`, and at row and head granularity `axis` (0 if a unit is some rows, all
leading dimensions flattened, or entries of a vector; 1 if it is some columns) and `groups`, the unit of every row or
column (null: each is a unit by itself).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from fillm.masks.tensor_mask import TensorMask

_NUMBERS = pa.list_(pa.field("element", pa.int64()))  # as Parquet calls it
LAYOUT_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("shape", _NUMBERS, nullable=False),
        pa.field("axis", pa.int64()),
        pa.field("groups", _NUMBERS),
    ]
)


@dataclass(frozen=True)
class TensorLayout:
    """Of one tensor.

    Attributes:
        shape: its shape.
        axis: 0 or 1; None if the tensor is one unit, or every weight of it.
        groups: the unit of every row or column, [rows or columns], int64; None if each is its own.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    groups: Tensor | None = None

    @property
    def units(self) -> int:
        """How many rows or columns there are, or units where they are grouped."""
        if self.groups is not None:
            return int(self.groups.max()) + 1
        numel = torch.Size(self.shape).numel()
        last = self.shape[-1] if len(self.shape) > 1 else 1
        return last if self.axis == 1 else numel // max(1, last)

    def mask(self, chosen: Tensor) -> TensorMask:
        """The weights of the chosen units, [units], bool."""
        along = chosen if self.groups is None else chosen[self.groups]
        if self.axis == 1:
            return TensorMask.from_bool(along.expand(self.shape))
        if len(self.shape) == 2:
            return TensorMask.from_rows(self.shape, along)
        if len(self.shape) < 2:
            return TensorMask.from_bool(along.view(self.shape))
        return TensorMask.from_bool(along.view(*self.shape[:-1], 1).expand(self.shape))


def layout_table(layouts: Iterable[tuple[str, TensorLayout]]) -> pa.Table:
    """The table of `LAYOUT_SCHEMA`, a row a tensor, in the order given."""
    rows = [
        {"name": name, "shape": layout.shape, "axis": layout.axis, "groups": _listed(layout.groups)}
        for name, layout in layouts
    ]
    return pa.Table.from_pylist(rows, LAYOUT_SCHEMA)


def read_layouts(table: pa.Table) -> dict[str, TensorLayout]:
    """The layouts in a table of `LAYOUT_SCHEMA`, by name."""
    return {
        row["name"]: TensorLayout(
            tuple(row["shape"]), row["axis"], None if row["groups"] is None else torch.tensor(row["groups"])
        )
        for row in table.to_pylist()
    }


def _listed(groups: Tensor | None) -> list[int] | None:
    return None if groups is None else groups.tolist()
