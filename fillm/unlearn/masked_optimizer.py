"""`MaskedOptimizer`: any weight-by-weight optimiser on the weights of a mask, and on nothing else.

AdamW and Sophia step with the fused kernels. Every other optimiser is shown, in the place of its parameters, vectors of
their selected weights, so that decay, momentum and whatever else it does can reach nothing else. Either way its state
has one entry a selected weight.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from fillm_kernels import Selection, masked_adamw_, masked_norm
from fillm_kernels.arguments import accumulation_dtype
from torch import Tensor, nn

from fillm.errors import UsageError
from fillm.unlearn import sophia
from fillm.unlearn.compact import gather, scatter_
from fillm.unlearn.matching import Masked, masked_parameters, parameters_of, parameters_of_groups

# Optimisers that look at a tensor as a whole (its norm, its rows and columns, its spectrum) or at all of them together:
# on a vector of selected weights they would be something else than their name says.
_WHOLE_TENSOR = (
    "adafactor", "adalomo", "apollo", "galore", "lamb", "lars", "lbfgs", "lomo", "muon", "shampoo", "soap",
    "sparseadam",
)  # fmt: skip
_KERNELS = {torch.optim.AdamW: "adamw", sophia.Sophia: "sophia"}


class MaskedOptimizer(torch.optim.Optimizer):
    """An optimiser that steps the weights of a mask and leaves every other bit as it is.

    Parameter groups are those of the wrapped optimiser, hyperparameters included: a scheduler may hold either of the
    two. Arithmetic and state are float32, or float64 for float64 parameters.

    Args:
        optimizer: what steps; its class may do nothing that mixes the weights of a tensor. State that it has already is
            kept for the selected weights.
        mask: a `fillm.Mask` of the model. Parameters without an entry in it are never stepped.
        model: gives the parameters their names; None takes those of an optimiser made from `named_parameters()`.
        master_weights: keep float32 copies of the selected weights of narrower parameters and step those, rounding
            into the parameters: without them a bfloat16 step under half a unit in the last place is lost.

    Attributes:
        optimizer: the wrapped optimiser.

    Raises:
        UsageError: parameters without names; a mask that selects from what the optimiser does not hold, or from a
            tensor of another shape; an optimiser that looks at a tensor as a whole, is capturable or differentiable;
            one that a masked optimiser's state was loaded into.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mask: Mapping[str, Any],
        model: nn.Module | None = None,
        *,
        master_weights: bool = False,
    ) -> None:
        _check_kind(optimizer)
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        named = parameters_of_groups(optimizer) if model is None else parameters_of(model)
        masked = masked_parameters(mask, ((n, p) for n, p in named if p in held), "the optimiser")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._entries = {item.parameter: _Entry(item, master_weights) for item in masked}
        for entry in self._entries.values():
            entry.refuse_compact(optimizer.state.get(entry.parameter, {}))
        self._kernel = _KERNELS.get(type(optimizer))
        if any(group.get("amsgrad") for group in optimizer.param_groups) or any(
            e.master for e in self._entries.values()
        ):
            self._kernel = None
        self._clip: Tensor | None = None
        for parameter in held:
            state = optimizer.state.pop(parameter, None)
            if state and (entry := self._entries.get(parameter)):
                optimizer.state[entry.compact] = {key: entry.taken_from(key, value) for key, value in state.items()}
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the selected weights of every parameter that has a gradient.

        Args:
            closure: evaluates the loss anew, if given.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._kernel is None:
            self._step_compact()
        else:
            self._step_fused()
        self._clip = None
        # A scheduler that was made for the wrapped optimiser asks it whether a step was taken.
        self.optimizer._opt_called = True
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip by the norm of the selected weights' gradient, all parameters together.

        The factor is taken into account by the next `step`, in the same pass: `.grad` stays as it is. What stands
        outside the mask does not count, NaN included.

        Args:
            max_norm: longest gradient; infinity only measures.

        Returns:
            The norm, with clips since the last step taken into account; scalar float64.
        """
        by_device: dict[torch.device, tuple[list[Tensor], list[Selection]]] = {}
        for entry in self._with_gradient():
            gradients, selections = by_device.setdefault(entry.parameter.device, ([], []))
            gradients.append(entry.parameter.grad)
            selections.append(entry.selection)
        if not by_device:
            return torch.zeros((), dtype=torch.float64)
        norms = [masked_norm(*pair) for pair in by_device.values()]
        norm = torch.stack([each.to(norms[0].device) for each in norms]).norm()
        if self._clip is not None:
            norm = norm * self._clip
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)
        self._clip = factor if self._clip is None else self._clip * factor
        return norm

    @property
    def due(self) -> bool:
        """Whether the wrapped optimiser is Sophia and the next step wants an estimate before it."""
        return isinstance(self.optimizer, sophia.Sophia) and self.optimizer.due

    def estimate(
        self, logits: sophia.Logits | Iterable[sophia.Logits], generator: torch.Generator | None = None
    ) -> None:
        """`Sophia.estimate` for the selected weights; `due` says when.

        Args:
            logits: as of `Sophia.estimate`.
            generator: of the drawn labels; None is torch's own.

        Raises:
            UsageError: the wrapped optimiser is not Sophia.
        """
        if not isinstance(self.optimizer, sophia.Sophia):
            raise UsageError(f"{type(self.optimizer).__name__} takes no curvature estimate; fillm.Sophia does")
        entries = [entry for entry in self._entries.values() if entry.parameter.requires_grad]
        parameters = [entry.parameter for entry in entries]
        selected = [partial(gather, selection=entry.selection) for entry in entries]
        betas = {p: group["betas"] for group in self.param_groups for p in group["params"]}
        estimates = sophia.estimated(logits, parameters, selected, generator)
        for entry, squares in zip(entries, estimates, strict=True):
            if squares is not None:
                state = sophia.started(self.state[entry.compact], entry.parameter, entry.selection.count)
                sophia.absorb(state, squares, betas[entry.parameter][1])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and a clip that no step has used."""
        super().zero_grad(set_to_none)
        self._clip = None

    @property
    def state_bytes(self) -> int:
        """Bytes of state, float32 copies of weights included."""
        held = [value for state in self.state.values() for value in state.values() if isinstance(value, Tensor)]
        held += [entry.compact for entry in self._entries.values() if entry.master]
        return sum(map(_bytes, held))

    def state_dict(self) -> dict[str, Any]:
        """State of the selected weights, as torch's optimisers lay it out, and which weights these are."""
        with self._compact_groups():
            state = self.optimizer.state_dict()
        masters = {e.name: e.compact.detach() for e in self._entries.values() if e.master}
        return {**state, "masters": masters, "mask": {e.name: e.digest for e in self._entries.values()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            UsageError: the state is that of another mask, or of an optimiser without one.
        """
        state = dict(state_dict)
        if state.pop("mask", None) != {e.name: e.digest for e in self._entries.values()}:
            raise UsageError("this optimiser state was made with another mask, or with none; start without it")
        masters = state.pop("masters")
        if set(masters) != {e.name for e in self._entries.values() if e.master}:
            raise UsageError("this optimiser state was made with another master_weights; give the same")
        with self._compact_groups():
            self.optimizer.load_state_dict(state)
        for entry in self._entries.values():
            if entry.master:
                entry.compact.data.copy_(masters[entry.name])
        self._share()

    def _with_gradient(self) -> list["_Entry"]:
        return [entry for entry in self._entries.values() if entry.parameter.grad is not None]

    def _step_fused(self) -> None:
        clip = 1.0 if self._clip is None else self._clip
        step = _adamw_step if self._kernel == "adamw" else sophia.masked_step
        for group in self.param_groups:
            # One call for all that it can take: a small step is short beside the way into a registered op.
            together: dict[tuple[torch.device, int], list[_Entry]] = {}
            for parameter in group["params"]:
                entry = self._entries.get(parameter)
                if entry is not None and parameter.grad is not None:
                    taken = int(self.state[entry.compact].get("step", 0))
                    together.setdefault((parameter.device, taken), []).append(entry)
            for entries in together.values():
                step(
                    [entry.parameter for entry in entries],
                    [entry.parameter.grad for entry in entries],
                    [self.state[entry.compact] for entry in entries],
                    [entry.selection for entry in entries],
                    group,
                    clip,
                )

    def _step_compact(self) -> None:
        entries = self._with_gradient()
        for entry in entries:
            entry.fill(self._clip)
        with self._compact_groups():
            self.optimizer.step()
        for entry in entries:
            entry.write_back()

    @contextmanager
    def _compact_groups(self) -> Iterator[None]:
        """The wrapped optimiser with vectors of selected weights for parameters."""
        whole = [group["params"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["params"] = [self._entries[p].compact for p in group["params"] if p in self._entries]
        try:
            yield
        finally:
            # Loading a state makes new groups.
            for group, params in zip(self.optimizer.param_groups, whole, strict=True):
                group["params"] = params


class _Entry:
    """A parameter and the vector of its selected weights, [count], by which its state goes.

    The vector has values during a step only, unless it is the master copy.
    """

    def __init__(self, item: Masked, master_weights: bool) -> None:
        self.name, self.parameter, self._item = item.name, item.parameter, item
        self._selection: Selection | None = None
        self.digest = _digest(item.entry)
        wide = accumulation_dtype(self.parameter.dtype)
        self.master = master_weights and wide != self.parameter.dtype
        values = gather(self.parameter, self.selection) if self.master else self.parameter.detach().new_empty(0)
        self.compact = nn.Parameter(values.to(wide))

    @property
    def selection(self) -> Selection:
        if self._selection is None or self._selection.starts.device != self.parameter.device:
            self._selection = self._item.selection()
        return self._selection

    def refuse_compact(self, state: Mapping[str, Any]) -> None:
        """Refuses state that is of the selected weights already: its mask and its master weights are lost."""
        compact = (self._item.entry.count,)
        if self.parameter.shape != compact and any(
            isinstance(value, Tensor) and value.shape == compact for key, value in state.items() if key != "step"
        ):
            raise UsageError(
                f"{self.name}: the state of a masked optimiser was loaded into one without a mask; wrap it first, then "
                "load. To resume a Trainer, hand it optimizers=(fillm.MaskedOptimizer(...), None)"
            )

    def taken_from(self, key: str, value: Any) -> Any:
        """The selected part of a state that was held for the whole parameter; a count of steps stays as it is."""
        if isinstance(value, Tensor) and key != "step" and value.shape == self.parameter.shape:
            return gather(value, self.selection).to(self.compact.dtype)
        return value

    def fill(self, clip: Tensor | None) -> None:
        """Takes the selected weights and their gradients."""
        assert self.parameter.grad is not None
        if not self.master:
            self.compact.data = gather(self.parameter, self.selection).to(self.compact.dtype)
        gradient = gather(self.parameter.grad, self.selection).to(self.compact.dtype)
        self.compact.grad = gradient if clip is None else gradient.mul_(clip.to(gradient))

    def write_back(self) -> None:
        """Gives the weights back."""
        scatter_(self.parameter, self.selection, self.compact.detach())
        self.compact.grad = None
        if not self.master:
            self.compact.data = self.compact.new_empty(0)


def _adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    selections: Sequence[Selection],
    group: dict[str, Any],
    clip: Tensor | float,
) -> None:
    """One AdamW step on the selected weights of parameters on one device that have taken equally many before.

    States go under the names of torch.optim.AdamW, [count] each.
    """
    for parameter, state, selection in zip(parameters, states, selections, strict=True):
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = (moment.view(-1) for moment in selection.new_state(parameter))
        state["step"] += 1
    beta1, beta2 = group["betas"]
    masked_adamw_(
        parameters,
        gradients,
        [(state["exp_avg"], state["exp_avg_sq"]) for state in states],
        selections,
        step=int(states[0]["step"]),
        lr=group["lr"],
        betas=(float(beta1), float(beta2)),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        clip=-clip if group["maximize"] else clip,  # to climb is to descend against the gradient
    )


def _check_kind(optimizer: torch.optim.Optimizer) -> None:
    for kind in type(optimizer).__mro__:
        if any(word in kind.__name__.lower() for word in _WHOLE_TENSOR):
            raise UsageError(
                f"{kind.__name__} looks at a tensor as a whole, so it cannot step a part of one; "
                "take AdamW, Sophia, SGD or another that treats every weight by itself"
            )
    if isinstance(optimizer, MaskedOptimizer):
        raise UsageError("the optimiser has a mask already; wrap the one inside")
    for flag in ("capturable", "differentiable"):
        if any(group.get(flag) for group in optimizer.param_groups):
            raise UsageError(f"{type(optimizer).__name__}: a masked step is not {flag}; leave the flag out")


def mask_digest(mask: Mapping[str, Any]) -> str:
    """sha256 of which weights a mask selects: 64 hexadecimal digits."""
    return hashlib.sha256("".join(f"{name} {_digest(entry)} " for name, entry in mask.items()).encode()).hexdigest()


def _bytes(tensor: Tensor) -> int:
    """What a tensor takes, its parts together where it is made of several as the 8-bit ones of torchao are."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _digest(entry: Any) -> str:
    """sha256 of which weights of a tensor are selected."""
    digest = hashlib.sha256(repr(tuple(entry.shape)).encode())
    for kind in ("rows", "bits"):
        if (selected := getattr(entry, kind)) is not None:
            digest.update(kind.encode())
            digest.update(selected.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
