"""Task-vector negation: learn the forget set further, then go as far the other way (arXiv 2212.04089).

theta <- theta_0 - eta * (theta_learned - theta_0)                                    Ilharco et al., section 3.2
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from fillm.capture import sample_losses
from fillm.data import Batch
from fillm.unlearn.config import TASK_VECTOR
from fillm.unlearn.losses import UnlearnLoss
from fillm.unlearn.reference import ReferenceRows
from fillm.unlearn.selected import SelectedEntries


class Learning(UnlearnLoss):
    """What made the model know the forget set, once more: the plain loss, without a retain term."""

    name: ClassVar[str] = TASK_VECTOR

    def __init__(self) -> None:
        super().__init__(gamma=1.0)

    def forget_values(
        self,
        model: nn.Module,
        batch: Batch,
        reference: ReferenceRows | None = None,
        alternatives: Batch | None = None,
        alternative_reference: ReferenceRows | None = None,
    ) -> Tensor:
        """[B], in nats per token."""
        return sample_losses(model, batch)


def negate(entries: SelectedEntries, start: Mapping[str, Tensor], eta: float) -> None:
    """Puts `theta_0 - eta * (theta - theta_0)` in the place of every selected entry.

    Args:
        entries: of the model that has learned.
        start: what `entries.take()` gave before.
        eta: how far, in lengths of the way that learning went.
    """
    now = entries.take()
    entries.put({name: v.double() - eta * (now[name].double() - v.double()) for name, v in start.items()})
