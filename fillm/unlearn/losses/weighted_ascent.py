"""Gradient ascent whose tokens count by how well the model knows them."""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from fillm.capture.losses import over_samples, token_losses
from fillm.data import Batch
from fillm.unlearn.losses.unlearn_loss import UnlearnLoss
from fillm.unlearn.reference import ReferenceRows


class _TokenWeights(UnlearnLoss):
    """forget(b) = (1/n_b) sum_t w_t log p(y_t), the weights without gradient."""

    @abstractmethod
    def weights(self, nll: Tensor) -> Tensor:
        """Of every answer token, from its negative log-likelihood: [N] -> [N]."""

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in nats per token."""
        nll = token_losses(model, batch)
        return -over_samples(self.weights(nll.detach()) * nll, batch)


class WeightedAscent(_TokenWeights):
    """Weighted gradient ascent: what is forgotten already no longer pulls.

        w_t = p(y_t)^beta                                    Wang et al. 2025, arXiv 2502.19301, WGA

    The paper sums over tokens; here, as in its released code, the mean over answer tokens.

    Args:
        beta: exponent; 0 is gradient ascent.
    """

    name: ClassVar[str] = "wga"

    def __init__(self, *, beta: float, **shared: Any) -> None:
        super().__init__(**shared)
        self.beta = beta

    def weights(self, nll: Tensor) -> Tensor:
        """p^beta."""
        return (-self.beta * nll).exp()


class SaturationImportance(_TokenWeights):
    """SatImp: tokens that are known, but not by heart.

        w_t = p(y_t)^beta1 (1 - p(y_t))^beta2                Yang et al. 2025, arXiv 2505.11953, SatImp

    Args:
        beta1: exponent of saturation.
        beta2: exponent of importance.
    """

    name: ClassVar[str] = "satimp"

    def __init__(self, *, beta1: float, beta2: float, **shared: Any) -> None:
        super().__init__(**shared)
        self.beta1, self.beta2 = beta1, beta2

    def weights(self, nll: Tensor) -> Tensor:
        """p^beta1 (1 - p)^beta2; `1 - exp(-nll)` of a token known by heart keeps its digits."""
        return (-self.beta1 * nll).exp() * (-(-nll).expm1()) ** self.beta2
