"""What all unlearning losses have in common: two terms, and what they need of the untouched model."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from fillm.capture.losses import answer_logits, over_samples, sample_losses
from fillm.data import Batch
from fillm.errors import UsageError
from fillm.unlearn.losses.divergence import Divergence
from fillm.unlearn.reference import Recorded, ReferenceRows, SetName


class UnlearnLoss(ABC):
    """A loss of two terms, each a mean of per-sample values.

        step loss = gamma * mean_b forget(b) + alpha * mean_r retain(r)

    A sample's value does not depend on its batch mates, on padding or on the layout. The means are the caller's, so
    that gradient accumulation keeps them exact.

    Attributes:
        name: of the loss, as `--loss` takes it.
        uses_alternatives: whether `forget_values` needs the batch with other answers to the same questions.
        gamma, alpha: weights of the two terms.
        retain_loss: `nll` or `kl`.
    """

    name: ClassVar[str]
    uses_alternatives: ClassVar[bool] = False

    def __init__(self, *, gamma: float, alpha: float = 0.0, retain_loss: str = "nll", seed: int = 0) -> None:
        self.gamma, self.alpha, self.retain_loss, self.seed = gamma, alpha, retain_loss, seed

    @property
    def uses_retain(self) -> bool:
        """Whether there is a retain term."""
        return self.alpha != 0.0

    @property
    def needs(self) -> dict[SetName, Recorded]:
        """What has to be recorded of the untouched model, by set; a set that is not named needs nothing."""
        return {"retain": Recorded("distributions")} if self.uses_retain and self.retain_loss == "kl" else {}

    def check(self, model: nn.Module) -> None:  # noqa: B027 - most losses fit every model
        """Refuses a model that the loss cannot be computed on.

        Raises:
            UsageError: naming the option.
        """

    @abstractmethod
    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """The forget term of every sample, with gradient.

        Args:
            model: the model being changed, its parameters as the caller has frozen them. Not a wrapper such as
                DistributedDataParallel: the output embedding is looked up in it.
            batch: B forget samples, on the model's device.
            reference: what `needs["forget"]` asks for, of these samples.
            alternatives: the same samples with other answers, where `uses_alternatives`.
            alternative_reference: what `needs["alternatives"]` asks for.

        Returns:
            [B] float32 (float64 for a float64 model), in nats unless the class says otherwise.
        """

    def retain_values(self, model: nn.Module, batch: Batch, reference: ReferenceRows | None = None) -> Tensor:
        """The retain term of every sample, with gradient: the mean over its answer tokens, in nats per token.

        `nll`: -log p(token). `kl`: KL(original || model), the term of TOFU (Maini et al. 2024, arXiv 2401.06121,
        "KL minimization", which takes the prompt as well).

        Args:
            model: as for `forget_values`.
            batch: B retain samples, on the model's device.
            reference: what `needs["retain"]` asks for, of these samples.

        Returns:
            [B] float32 (float64 for a float64 model).
        """
        if self.retain_loss == "nll":
            return sample_losses(model, batch)
        return divergence(model, batch, required(reference))


def divergence(model: nn.Module, batch: Batch, reference: ReferenceRows) -> Tensor:
    """Mean over each sample's answer tokens of KL(reference || model): [B], in nats per token."""
    logits, _ = answer_logits(model, batch)
    return over_samples(Divergence.apply(logits, reference.log_probs, True), batch)


def required(reference: ReferenceRows | None) -> ReferenceRows:
    """The reference that a loss cannot do without.

    Raises:
        UsageError: if there is none.
    """
    if reference is None:
        raise UsageError("this loss compares with the untouched model: record what `needs` names in a ReferenceCache")
    return reference


def aligned(alternatives: Batch | None, batch: Batch) -> Batch:
    """The alternatives of a batch's samples.

    Raises:
        UsageError: if there are none, or they are of other samples.
    """
    if alternatives is None:
        raise UsageError("this loss needs alternatives: batches of the same questions with other answers")
    if not torch.equal(alternatives.indices, batch.indices):
        raise UsageError("the alternatives are of other samples than the forget batch; collate the same positions")
    return alternatives
