"""Which rows of an activation belong to which sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fillm.capture.losses import answer_offsets
from fillm.capture.segments import sample_of_row, segment_sum
from fillm.data import Batch


@dataclass(frozen=True)
class RowMap:
    """Reads the batch's layout off an activation's shape; what it cannot read is left to the exact fallback."""

    num_samples: int
    num_tokens: int  # of a padded grid B * T, or of a packed row
    offsets: Tensor  # [B + 1], token positions in the flattened grid
    packed: bool
    answers: Tensor  # [B + 1], the same among the positions that carry loss, which are all that the head sees

    @classmethod
    def of(cls, batch: Batch) -> "RowMap":
        """The map of one batch."""
        packed = batch.layout == "packed"
        return cls(len(batch.indices), batch.input_ids.numel(), batch.offsets, packed, answer_offsets(batch))

    def is_answers(self, lead: torch.Size) -> bool:
        """Whether leading dimensions `[1, R]` are those of the positions that carry loss."""
        return len(lead) == 2 and lead[0] == 1 and lead[1] == int(self.answers[-1])

    def repeats(self, lead: torch.Size) -> int | None:
        """How many consecutive rows each token has in a tensor of leading dimensions `lead`; None if it cannot be read.

        Padded: the first dimension is B or B * T, or the only one a multiple of B * T. Packed: the first after any
        leading 1 is the number of tokens N.
        """
        rows = lead.numel()
        if self.packed:
            dims = [size for size in lead]
            while len(dims) > 1 and dims[0] == 1:
                dims.pop(0)
            return rows // self.num_tokens if dims and dims[0] == self.num_tokens else None
        if lead and lead[0] in (self.num_samples, self.num_tokens) and rows % self.num_samples == 0:
            return rows // self.num_samples  # rows a sample; the grid is uniform
        if len(lead) == 1 and rows % self.num_tokens == 0:
            return rows // self.num_samples  # several rows a token, such as its heads
        return None

    def holds_tokens(self, lead: torch.Size) -> bool:
        """Whether leading dimensions are those of all tokens; one of size B alone may be gathered rows."""
        if self.is_answers(lead):
            return True
        return self.repeats(lead) is not None and (len(lead) > 1 or lead[0] == self.num_tokens)

    def row_offsets(self, lead: torch.Size) -> Tensor | None:
        """[B + 1] offsets of the samples' rows in the flattened leading dimensions, or None."""
        if self.is_answers(lead):
            return self.answers
        repeats = self.repeats(lead)
        if repeats is None:
            return None
        if self.packed:
            return self.offsets * repeats
        return torch.arange(self.num_samples + 1, device=self.offsets.device) * repeats

    def tokens(self) -> Tensor:
        """[num_tokens], the sample that owns each token of the flattened grid."""
        return sample_of_row(self.offsets)

    def sum_by_sample(self, values: Tensor, shape: torch.Size) -> Tensor | None:
        """Sums `values` over everything but the sample and the dimensions of a parameter of `shape` broadcast to it.

        Returns:
            [B, *shape], float32 or wider; None if rows cannot be assigned.
        """
        width = len(shape)
        lead = values.shape[: values.ndim - width]
        offsets = self.row_offsets(lead) if lead else None
        if offsets is None:
            return None
        wide = torch.promote_types(values.dtype, torch.float32)
        out = segment_sum(values.to(wide).reshape(lead.numel(), *values.shape[len(lead) :]), offsets)
        for axis, size in enumerate(shape, start=1):
            if size == 1 and out.shape[axis] != 1:
                out = out.sum(axis, keepdim=True)
        return out
