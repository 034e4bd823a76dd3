"""Which parameter each entry of a mask is about. A name that finds no parameter is an error, never passed over."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from fillm_kernels import Selection
from torch import nn

from fillm.errors import UsageError


class Masked(NamedTuple):
    """A parameter of which something is selected.

    Attributes:
        name: as the mask has it.
        parameter: the tensor.
        entry: its part of the mask: `shape`, `rows`, `bits`, `count`, `selection(device)`.
    """

    name: str
    parameter: nn.Parameter
    entry: Any

    def selection(self) -> Selection:
        """The selected weights as the kernels take them, where the parameter lies now."""
        return self.entry.selection(self.parameter.device)


def masked_parameters(mask: Mapping[str, Any], named: Iterable[tuple[str, nn.Parameter]], holder: str) -> list[Masked]:
    """The parameters that a mask selects from, in the order of the mask.

    Args:
        mask: name -> entry, a `fillm.Mask`.
        named: names and parameters; a tied parameter under each of its names. `module.` of DistributedDataParallel and
            `_orig_mod.` of torch.compile are not part of a name.
        holder: whose parameters these are, for the message.

    Raises:
        UsageError: an entry without a parameter, of another shape, or for a parameter that another entry has already;
            a parameter that cannot be stepped weight by weight in place.
    """
    exact = dict(named)
    bare = {bare_name(name): parameter for name, parameter in exact.items()}
    found: dict[nn.Parameter, Masked] = {}
    for name, entry in mask.items():
        parameter = exact.get(name, bare.get(bare_name(name)))
        if parameter is None:
            some = ", ".join(list(bare)[:3]) or "none"
            raise UsageError(f"the mask selects from {name}, of which {holder} knows nothing (its first names: {some})")
        if tuple(parameter.shape) != tuple(entry.shape):
            raise UsageError(
                f"{name}: the mask is one of shape {list(entry.shape)}, the parameter has {list(parameter.shape)}; "
                "make the mask from this model"
            )
        if parameter in found:
            raise UsageError(f"{name} and {found[parameter].name} are one tied tensor; give the mask one entry for it")
        if hasattr(parameter, "device_mesh"):
            raise UsageError(
                f"{name} is sharded (FSDP2), and a mask needs whole parameters; keep the model whole on every device "
                "(DistributedDataParallel)"
            )
        if not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UsageError(f"{name} is {kind}, and a mask needs floating-point weights; load the model unquantised")
        if not parameter.is_contiguous():
            raise UsageError(
                f"{name} is not contiguous, so its weights have no place in place; store a contiguous copy"
            )
        found[parameter] = Masked(name, parameter, entry)
    return list(found.values())


def parameters_of(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """All parameters of a model, tied ones under each of their names."""
    return model.named_parameters(remove_duplicate=False)


def parameters_of_groups(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an optimiser that was made from named ones.

    Raises:
        UsageError: if it was not.
    """
    named = []
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise UsageError(
                "parameters without names: give model=, or make the optimiser from model.named_parameters()"
            )
        named += zip(group["param_names"], group["params"], strict=True)
    return named


def bare_name(name: str) -> str:
    """A name without what DistributedDataParallel and torch.compile put before the names of what they wrap."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
