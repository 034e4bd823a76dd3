"""`MaskCallback`: a mask for `transformers.Trainer`, and for whatever is built on it."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from fillm.errors import NumericsError
from fillm.unlearn.compact import zero_outside_
from fillm.unlearn.freezing import Freezing, frozen_outside
from fillm.unlearn.masked_optimizer import MaskedOptimizer
from fillm.unlearn.matching import Masked, masked_parameters, parameters_of
from fillm.unlearn.untouched import Untouched, Verification


class MaskCallback(TrainerCallback):
    """Has a `Trainer` train the weights of a mask only, and verifies at the end that it did.

        trainer = Trainer(model, args, train_dataset=rows, callbacks=[MaskCallback(mask)])
        trainer.train()

    Tensors of which nothing is selected are frozen; gradients outside the mask are set to 0 before Trainer clips, so
    that they count for no norm; the optimiser is wrapped in a `MaskedOptimizer`. To resume from a checkpoint, hand the
    Trainer `optimizers=(MaskedOptimizer(...), None)` as well: it loads the optimiser's state before any callback is
    asked.

    Args:
        mask: a `fillm.Mask` of the model.
        master_weights: of `MaskedOptimizer`.

    Attributes:
        savings: what `frozen_outside` saves, once training began.
        verification: what became of the model, once training ended.
    """

    def __init__(self, mask: Mapping[str, Any], *, master_weights: bool = False) -> None:
        self.mask, self.master_weights = mask, master_weights
        self.savings: dict[str, int | None] = {}
        self.verification: Verification | None = None
        self._frozen: Freezing | None = None
        self._untouched: Untouched | None = None
        self._hooks: list[RemovableHandle] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Freezes, before the optimiser is made and before processes agree on which gradients there are."""
        if model is not None:
            self._freeze(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        """Takes down how the model is and puts the mask around the optimiser.

        Raises:
            UsageError: a mask, an optimiser or a kind of checkpointing that does not go with the model; a checkpoint's
                optimiser state that Trainer has loaded into an optimiser without a mask.
        """
        self._freeze(model)  # again: Trainer has turned gradient checkpointing on since
        self._untouched = Untouched.before(model, self.mask)
        if not isinstance(optimizer.optimizer, MaskedOptimizer):
            masked = MaskedOptimizer(optimizer.optimizer, self.mask, model, master_weights=self.master_weights)
            # accelerate's wrapper remembers the bound step of what it wraps for float16; this has it look again.
            optimizer.__setstate__({"optimizer": masked})
        for item in masked_parameters(self.mask, parameters_of(model), "the model"):
            if item.entry.count < item.parameter.numel():
                self._hooks.append(item.parameter.register_post_accumulate_grad_hook(_only_inside(item)))

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Verifies, and gives the tensors their `requires_grad` back.

        Raises:
            NumericsError: a weight outside the mask changed.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._thaw()
        assert self._untouched is not None
        self.verification = self._untouched.verify(model)
        if not self.verification.outside_mask_bit_equal:
            names = ", ".join(self.verification.differing[:3])
            raise NumericsError(
                f"weights outside the mask changed in {len(self.verification.differing)} tensors ({names}, ...); "
                "something beside the optimiser writes to the model"
            )
        if not self.verification.mask_applied:
            warnings.warn("training changed none of the selected weights", stacklevel=2)

    def _freeze(self, model: nn.Module) -> None:
        self._thaw()
        self._frozen = frozen_outside(model, self.mask)
        self.savings = self._frozen.savings

    def _thaw(self) -> None:
        if self._frozen is not None:
            self._frozen.restore()
            self._frozen = None


def _only_inside(item: Masked) -> Any:
    selections = {}

    def hook(parameter: nn.Parameter) -> None:
        if parameter.device not in selections:
            selections[parameter.device] = item.selection()
        assert parameter.grad is not None
        zero_outside_(parameter.grad, selections[parameter.device])

    return hook
