"""When a run has forgotten enough, when it has lost too much, and which of its evaluations it goes back to.

Two bounds, both on means over the evaluated samples, in nats a token: a forget loss at or above `forget_target` is
forgotten enough; a retain loss above `retain_bound` is too much lost. A run stops at the first evaluation that meets
either, and keeps the best evaluation, the start (step 0) among them:

1. one within the retain bound rather than one beyond it;
2. among those, one that has reached the target rather than one that has not;
3. among those that reached it the one of lowest retain loss, else the one of highest forget loss.

Without a bound, the last evaluation is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """Mean losses of the evaluated samples after some step, in nats a token.

    Attributes:
        step: optimiser steps taken, 0 at the start.
        forget: over the forget set.
        retain: over the retain set.
    """

    step: int
    forget: float
    retain: float


@dataclass(frozen=True)
class StoppingRule:
    """The two bounds, None where there is none."""

    forget_target: float | None = None
    retain_bound: float | None = None

    @property
    def bounded(self) -> bool:
        """Whether there is any bound, and so a best evaluation to go back to."""
        return self.forget_target is not None or self.retain_bound is not None

    def reason(self, evaluation: Evaluation) -> str | None:
        """Why a run ends at this evaluation, None if it does not."""
        if self._too_much_lost(evaluation):
            return f"retain loss {evaluation.retain:.4f} is above {self.retain_bound}"
        if self._forgotten(evaluation):
            return f"forget loss {evaluation.forget:.4f} has reached {self.forget_target}"
        return None

    def best(self, evaluations: Sequence[Evaluation]) -> Evaluation:
        """The evaluation whose weights are kept; of equals the earliest.

        Args:
            evaluations: at least one, in the order of their steps.
        """
        return max(evaluations, key=self._merit) if self.bounded else evaluations[-1]

    def _merit(self, evaluation: Evaluation) -> tuple[bool, bool, float]:
        forgotten = self._forgotten(evaluation)
        merit = -evaluation.retain if forgotten else evaluation.forget
        # NaN compares with nothing: it would hide whatever stands beside it.
        return not self._too_much_lost(evaluation), forgotten, -math.inf if math.isnan(merit) else merit

    def _forgotten(self, evaluation: Evaluation) -> bool:
        return self.forget_target is not None and evaluation.forget >= self.forget_target

    def _too_much_lost(self, evaluation: Evaluation) -> bool:
        return self.retain_bound is not None and not evaluation.retain <= self.retain_bound
