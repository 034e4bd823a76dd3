"""Preference losses: the forget answer is the one not to give."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fillm.capture.losses import sample_losses
from fillm.data import Batch
from fillm.unlearn.losses.unlearn_loss import UnlearnLoss, aligned, required
from fillm.unlearn.reference import Recorded, ReferenceRows, SetName


class _Preference(UnlearnLoss):
    """Losses of the form -(2/beta) log sigmoid(beta * margin).

    Args:
        beta: inverse temperature, above 0.
    """

    def __init__(self, *, beta: float, **shared: Any) -> None:
        super().__init__(**shared)
        self.beta = beta

    def _of_margin(self, margin: Tensor) -> Tensor:
        return -(2.0 / self.beta) * F.logsigmoid(self.beta * margin)


class NegativePreference(_Preference):
    """NPO: the answer is to become less likely than it was, and the less it is so already, the harder the push.

        forget(b) = -(2/beta) log sigmoid(-beta log(p(y) / p_original(y)))     Zhang et al. 2024, arXiv 2404.05868, (3)

    p(y) is the probability of the whole answer: log-ratios are sums over its tokens. With `--alpha 0` it is the
    paper's NPO, with a retain term its NPO+RT. For beta to 0 its gradient becomes that of the summed gradient ascent.
    """

    name: ClassVar[str] = "npo"

    @property
    def needs(self) -> dict[SetName, Recorded]:
        """The original's loss of every forget answer."""
        return {**super().needs, "forget": Recorded("nll")}

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in nats of a whole answer; 0 where it has become impossible."""
        return self._of_margin(sample_losses(model, batch, "sum") - required(reference).values)


class SimpleNegativePreference(_Preference):
    """SimNPO: NPO without a reference, by the mean over tokens instead.

        forget(b) = -(2/beta) log sigmoid(beta * (-(1/n_b) log p(y) - delta))  Fan et al. 2024, arXiv 2410.07163, (4)

    The paper's margin gamma is `beta * delta`: `delta` is the loss per token that an answer should exceed.

    Args:
        delta: margin, in nats per token.
    """

    name: ClassVar[str] = "simnpo"

    def __init__(self, *, delta: float, **shared: Any) -> None:
        super().__init__(**shared)
        self.delta = delta

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in nats per token."""
        return self._of_margin(sample_losses(model, batch) - self.delta)


class DirectPreference(_Preference):
    """DPO with a refusal as the preferred answer.

        forget(b) = -(2/beta) log sigmoid(beta * (log(p(y_idk) / p_original(y_idk)) - log(p(y) / p_original(y))))

    Rafailov et al. 2023, arXiv 2305.18290, equation (7), with the factor 2/beta that TOFU's and later unlearning code
    puts before it so that it compares with NPO (`--gamma` of half of beta takes it out). Log-ratios are sums over the
    tokens of an answer.
    """

    name: ClassVar[str] = "dpo"
    uses_alternatives: ClassVar[bool] = True

    @property
    def needs(self) -> dict[SetName, Recorded]:
        """The original's loss of every forget answer and of every alternative."""
        return {**super().needs, "forget": Recorded("nll"), "alternatives": Recorded("nll")}

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in nats of a whole answer."""
        worse = sample_losses(model, batch, "sum") - required(reference).values
        better = sample_losses(model, aligned(alternatives, batch), "sum") - required(alternative_reference).values
        return self._of_margin(worse - better)
