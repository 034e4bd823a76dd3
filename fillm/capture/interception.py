"""Sees every operation of a forward pass in which a parameter takes part.

A `TorchFunctionMode` looks at the arguments of every torch call. What a parameter is turned into on its own (`1 + w`,
`w.float()`, `W.t()`) is followed in a small side graph; where it meets an activation, a rule of `fillm.capture.rules`
takes over. A meeting without a rule is recorded by name, and the tensor goes to the exact batch-1 fallback: what a
model does with its parameters is never guessed from class names.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Elementwise maps: their Jacobian is diagonal, so one backward gives it for all samples.
_ELEMENTWISE = {
    "float",
    "double",
    "half",
    "bfloat16",
    "to",
    "type_as",
    "type",
    "exp",
    "neg",
    "softplus",
    "sigmoid",
    "tanh",
}
_ELEMENTWISE |= {"add", "radd", "sub", "rsub", "mul", "rmul", "div", "truediv", "pow", "square", "clone", "contiguous"}
_TRANSPOSES = {"t", "T", "mT"}


@dataclass
class Tracked:
    """A parameter, or what became of it before it met an activation."""

    name: str
    value: Tensor  # what the model holds; kept alive so that its id stays its own
    side: Tensor | None = None  # the same value with a graph back to `leaf`
    leaf: Tensor | None = None
    elementwise: bool = True
    transposed: bool = False

    @property
    def is_parameter(self) -> bool:
        """Whether nothing happened to it yet."""
        return self.side is None

    def to_parameter(self, gradients: Tensor) -> Tensor:
        """Per-sample gradients of `value`, [B, *value.shape], as per-sample gradients of the parameter, [B, *shape]."""
        if self.side is None or self.leaf is None:
            return gradients
        side = gradients.to(self.side.dtype)
        if self.elementwise and self.side.shape == self.leaf.shape:
            (slope,) = torch.autograd.grad(self.side, self.leaf, torch.ones_like(self.side), retain_graph=True)
            return side * slope
        rows = [torch.autograd.grad(self.side, self.leaf, row, retain_graph=True)[0] for row in side]
        return torch.stack(rows)


def function_name(func: Callable[..., Any]) -> str:
    """`Tensor.__mul__` -> `mul`, `Tensor.T.__get__` -> `T`, `F.linear` -> `linear`."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.removeprefix("__").removesuffix("__")


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, Tensor))


def _swaps_last_two(name: str, args: Any, result: Tensor) -> bool:
    """Whether an operation made `result`, a matrix or a stack of some, by transposing each."""
    if name == "transpose":
        return result.ndim in (2, 3) and {axis % result.ndim for axis in args[1:]} == {result.ndim - 2, result.ndim - 1}
    return name in _TRANSPOSES and (result.ndim == 2 or (name == "mT" and result.ndim == 3))


class Interception(TorchFunctionMode):
    """Active around one forward and backward.

    Args:
        parameters: name -> parameter, the tensors whose meetings matter; all others pass untouched.
        boundary: called as `boundary(name, func, args, kwargs, find)` at a meeting; returns the result, or
            `NotImplemented` where no rule fits, after which the operation runs as it is.
        uncovered: called with (parameter name, operation name) at a meeting without a rule.
        is_activation: tells a tensor that depends on the batch from a constant of the model.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        boundary: Callable[..., Any],
        uncovered: Callable[..., None],
        is_activation: Callable[[Tensor], bool],
    ) -> None:
        super().__init__()
        self.boundary, self.uncovered, self.is_activation = boundary, uncovered, is_activation
        self.tracked = {id(p): Tracked(name, p) for name, p in parameters.items()}

    def find(self, value: Any) -> Tracked | None:
        """The record of a parameter or of what was made from one."""
        return self.tracked.get(id(value))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracked = self.tracked
        for arg in args:
            if id(arg) in tracked or (type(arg) in (list, tuple) and any(id(item) in tracked for item in arg)):
                break
        else:
            if not kwargs or not any(id(value) in tracked for value in kwargs.values()):
                return func(*args, **kwargs)
        return self._meet(func, args, kwargs)

    def _meet(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = function_name(func)
        everything = list(_tensors([*args, *kwargs.values()]))
        found = [record for record in map(self.find, everything) if record is not None]
        others = [t for t in everything if self.find(t) is None]
        if name == "embedding" or any(t.requires_grad or self.is_activation(t) for t in others):
            result = self.boundary(name, func, args, kwargs, self.find)
            if result is not NotImplemented:
                return result
            if name == "embedding" and all(t.ndim == 1 for t in others):  # positions that the batch shares
                return self._follow(name, func, args, kwargs, found)
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.is_floating_point():
                for record in found:
                    self.uncovered(record.name, name)
            return result
        if name == "getitem" and isinstance(args[1], Tensor):  # `W[ids]`, perhaps a lookup
            result = self.boundary(name, func, args, kwargs, self.find)
            if result is not NotImplemented:
                return result
        return self._follow(name, func, args, kwargs, found)

    def _follow(self, name: str, func: Any, args: Any, kwargs: Any, found: list[Tracked]) -> Any:
        """Runs an operation on parameters alone and remembers what came of them."""
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or self.find(result) is not None or not result.is_floating_point():
            if isinstance(result, list | tuple) and any(isinstance(item, Tensor) for item in result):
                for record in found:
                    self.uncovered(record.name, name)
            return result
        if len(found) != 1:
            for record in found:
                self.uncovered(record.name, name)
            return result
        (record,) = found
        leaf = record.leaf if record.leaf is not None else record.value.detach().requires_grad_(True)
        side_of = {id(record.value): record.side if record.side is not None else leaf}
        side = func(*(side_of.get(id(a), a) for a in args), **{k: side_of.get(id(a), a) for k, a in kwargs.items()})
        if not side.requires_grad:  # detached, or made where the model takes no gradients: a constant from here on
            return result
        made = Tracked(
            record.name,
            result.detach() if result.requires_grad else result,
            side,
            leaf,
            elementwise=record.elementwise and name in _ELEMENTWISE,
            transposed=record.is_parameter and _swaps_last_two(name, args, result),
        )
        self.tracked[id(made.value)] = made
        return made.value
