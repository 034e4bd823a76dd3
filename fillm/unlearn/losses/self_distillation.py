"""The original model's own distributions, but for what it knew."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fillm.capture.losses import answer_logits, over_samples
from fillm.data import Batch
from fillm.unlearn.losses.divergence import Divergence
from fillm.unlearn.losses.unlearn_loss import UnlearnLoss, required
from fillm.unlearn.reference import Recorded, ReferenceRows, SetName


class SelfDistillation(UnlearnLoss):
    """UNDIAL: distils the original with the logit of every answer token lowered.

        forget(b) = -(1/n_b) sum_t sum_v q_t(v) log p(v),    q_t = softmax(z_original,t - beta onehot(y_t))

    Dong et al. 2024, arXiv 2402.10052, section 3. The mean over answer tokens (released code averages over the prompt
    and padding as well). Never below the entropy of q.

    Args:
        beta: what is taken off the logit.
    """

    name: ClassVar[str] = "undial"

    def __init__(self, *, beta: float, **shared: Any) -> None:
        super().__init__(**shared)
        self.beta = beta

    @property
    def needs(self) -> dict[SetName, Recorded]:
        """The original's distributions at every forget answer token."""
        return {**super().needs, "forget": Recorded("distributions")}

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in nats per token."""
        original = required(reference)
        logits, wanted = answer_logits(model, batch)

        def lowered(rows: slice) -> Tensor:
            scores = original.log_probs(rows)  # softmax does not see that a constant is missing from the logits
            at = wanted[rows, None]
            return torch.log_softmax(scores.scatter(1, at, scores.gather(1, at) - self.beta), 1)

        return over_samples(Divergence.apply(logits, lowered, False), batch)
