"""The selected entries of a model, copied out without gaps and put back: what a checkpoint and a best state hold."""

from collections.abc import Mapping

from torch import Tensor, nn

from fillm.masks import Mask
from fillm.unlearn.compact import gather, scatter_


class SelectedEntries:
    """The entries of a model's parameters that a mask selects.

    Args:
        model: holds every tensor of the mask, in its shape.
        mask: what is selected.
    """

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        parameters = dict(model.named_parameters())
        self._of = {name: (parameters[name], entry.selection(parameters[name].device)) for name, entry in mask.items()}

    def take(self) -> dict[str, Tensor]:
        """A copy of every tensor's selected entries in the order of their flat indices, [count], on the CPU."""
        return {name: gather(parameter, selection).cpu() for name, (parameter, selection) in self._of.items()}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Writes what `take` gave, or anything of its names and sizes, back into the parameters."""
        for name, (parameter, selection) in self._of.items():
            scatter_(parameter, selection, values[name].to(parameter.device))

    @property
    def counts(self) -> dict[str, int]:
        """Selected entries of every tensor."""
        return {name: selection.count for name, (_, selection) in self._of.items()}
