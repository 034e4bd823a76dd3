"""Representation misdirection: what one block says of forget samples is turned towards nothing."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fillm.capture.losses import over_samples
from fillm.data import Batch
from fillm.errors import UsageError
from fillm.unlearn.block_states import answer_states, decoder_blocks
from fillm.unlearn.losses.unlearn_loss import UnlearnLoss, required
from fillm.unlearn.reference import Recorded, ReferenceRows, SetName


class Misdirection(UnlearnLoss):
    """RMU, on the output h of one block at the answer's tokens, H wide.

        forget(b) = (1/n_b) sum_t |h_t - c u|^2 / H           Li et al. 2024, arXiv 2403.03218, section 4
        retain(r) = (1/n_r) sum_t |h_t - h_original,t|^2 / H

    u is drawn uniformly from [0, 1)^H and scaled to length 1; c is the coefficient. The division by H is that of the
    released code, whose defaults these are. Values are squared activations, not nats. The paper trains the MLP output
    projections of the block and of the two below it: choose them with the mask.

    Args:
        rmu_layer: the block, from 0.
        rmu_coefficient: c.
        seed: of u.
    """

    name: ClassVar[str] = "rmu"

    def __init__(self, *, gamma: float, alpha: float, rmu_layer: int, rmu_coefficient: float, seed: int = 0) -> None:
        super().__init__(gamma=gamma, alpha=alpha, seed=seed)
        self.layer, self.coefficient = rmu_layer, rmu_coefficient

    @property
    def needs(self) -> dict[SetName, Recorded]:
        """The original's output of the block at every retain answer token."""
        return {"retain": Recorded("block", self.layer)} if self.uses_retain else {}

    def check(self, model: nn.Module) -> None:
        """Refuses a model that has no such block."""
        count = len(decoder_blocks(model))
        if self.layer >= count:
            raise UsageError(f"--rmu-layer {self.layer}: the model has {count} blocks; give 0 to {count - 1}")

    def control_vector(self, width: int) -> Tensor:
        """The target `c u`: [width] float32 on the CPU, the same for the same seed."""
        drawn = torch.rand(width, generator=torch.Generator().manual_seed(self.seed))
        return self.coefficient * drawn / drawn.norm()

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in squared activations."""
        states = answer_states(model, batch, self.layer)
        return _mean_squared_distance(states, self.control_vector(states.shape[1]).to(states.device), batch)

    def retain_values(self, model: nn.Module, batch: Batch, reference: ReferenceRows | None = None) -> Tensor:
        """[B], in squared activations."""
        return _mean_squared_distance(answer_states(model, batch, self.layer), required(reference).values, batch)


def _mean_squared_distance(states: Tensor, to: Tensor, batch: Batch) -> Tensor:
    """[N, H] and [N, H] or [H] -> [B], float32 at least."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return over_samples((wide - to).square().mean(1), batch)
