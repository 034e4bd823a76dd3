"""Gradient ascent on the forget set, alone and beside a term that keeps the retain set."""

from typing import ClassVar

from torch import Tensor, nn

from fillm.capture.losses import sample_losses
from fillm.data import Batch
from fillm.unlearn.losses.unlearn_loss import UnlearnLoss
from fillm.unlearn.reference import ReferenceRows


class GradientAscent(UnlearnLoss):
    """The negative of what training minimised.

        forget(b) = (1/n_b) sum_t log p(y_t)              Jang et al. 2022, arXiv 2210.01504, equation (1)

    The paper sums over tokens; here, as in the code of TOFU and all that followed it, the mean over answer tokens.
    """

    name: ClassVar[str] = "ga"

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in nats per token; unbounded below."""
        return -sample_losses(model, batch)


class GradientDifference(GradientAscent):
    """Gradient ascent on forget samples, descent on retain samples (Liu et al. 2022, arXiv 2203.12817).

    retain(r) = nll or KL(original || model), the mean over answer tokens
    """

    name: ClassVar[str] = "grad-diff"


class RetainedDistribution(GradientAscent):
    """Gradient ascent on forget samples, the original's distributions on retain samples.

        retain(r) = (1/n_r) sum_t KL(p_original || p)      Maini et al. 2024, arXiv 2401.06121

    The paper takes the mean over all tokens, prompt included; here over answer tokens, as everywhere else.
    """

    name: ClassVar[str] = "kl"

    def __init__(self, *, gamma: float, alpha: float, seed: int = 0) -> None:
        super().__init__(gamma=gamma, alpha=alpha, retain_loss="kl", seed=seed)
