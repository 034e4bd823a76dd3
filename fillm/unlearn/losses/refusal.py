"""Learning to say that one does not know."""

from typing import ClassVar

from torch import Tensor, nn

from fillm.capture.losses import sample_losses
from fillm.data import Batch
from fillm.unlearn.losses.unlearn_loss import UnlearnLoss, aligned
from fillm.unlearn.reference import ReferenceRows


class Refusal(UnlearnLoss):
    """Forget questions get "I don't know" for an answer.

        forget(b) = -(1/n_b) sum_t log p(y_idk,t)            Maini et al. 2024, arXiv 2401.06121

    The mean over the tokens of the refusal.
    """

    name: ClassVar[str] = "idk"
    uses_alternatives: ClassVar[bool] = True

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in nats per token."""
        return sample_losses(model, aligned(alternatives, batch))
