"""Fused experts: a stack of weights `[E, ...]` of which every token uses a few slices.

While a batch is captured, the forward of a fused-experts module (transformers' `use_experts_implementation` classes,
which state their layout in `has_gate`, `has_bias`, `is_transposed`) is replaced by one that computes the same function
expert by expert and reports, for each, which samples' rows it saw. Whether it really is the same function is checked
against the module's own gradient before a run relies on it (`fillm.capture.verification`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fillm.capture.boundaries import LinearBoundary
from fillm.capture.combined import StackedGradients
from fillm.capture.gradients import DenseGradients, OuterGradients
from fillm.capture.rules import Rules
from fillm.capture.segments import segment_sum

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")


def fused_experts(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` whose forward this file knows how to follow."""
    return [
        module
        for module in model.modules()
        if all(hasattr(module, name) for name in _LAYOUT) and not getattr(module, "has_post_expert_norm", False)
    ]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives a module another forward; the owner's own instance attribute (accelerate sets one) returns."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def followed_experts(modules: list[nn.Module], names: dict[int, str], rules: Rules) -> Iterator[None]:
    """Replaces the forward of `modules` for the duration; `names` maps `id(parameter)` to a tensor in scope."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced_forward(module, MethodType(_forward(names, rules), module)))
        yield


def _forward(names: dict[int, str], rules: Rules) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, top_k = top_k_index.shape
        width = hidden_states.shape[-1]
        hidden = hidden_states.reshape(-1, width)
        owner = rules.rows.tokens()
        # Routes sorted by expert, then by token: every expert's rows are contiguous and in sample order.
        route_expert, route = torch.sort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(route_expert, minlength=self.num_experts).tolist()
        first = "gate_up_proj" if self.has_gate else "up_proj"
        pieces, start = [], 0
        for expert in range(self.num_experts):
            rows = route[start : start + counts[expert]]
            start += counts[expert]
            if not rows.numel():
                continue
            token = rows // top_k
            per_sample = torch.bincount(owner[token], minlength=rules.rows.num_samples)
            offsets = torch.cat([per_sample.new_zeros(1), per_sample.cumsum(0)])
            inner = _expert_linear(self, first, expert, hidden[token], offsets, names, rules)
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            pieces.append(_expert_linear(self, "down_proj", expert, inner, offsets, names, rules))
        # Back to the order of the routes: a gather and a sum in fixed order, no atomics.
        out = torch.cat(pieces)[torch.argsort(route[:start])] * top_k_weights.reshape(-1, 1)
        return out.view(tokens, top_k, width).sum(1).to(hidden_states.dtype).view_as(hidden_states)

    return forward


def _expert_linear(
    module: Any, weight: str, expert: int, x: Tensor, offsets: Tensor, names: dict[int, str], rules: Rules
) -> Tensor:
    stack, biases = getattr(module, weight), getattr(module, weight + "_bias", None) if module.has_bias else None
    stack_name, bias_name = names.get(id(stack)), names.get(id(biases))
    samples = offsets.numel() - 1

    def site(x: Tensor, dy: Tensor) -> None:
        if stack_name is not None:
            part = OuterGradients(x, dy, offsets, module.is_transposed)
            rules.deliver(stack_name, StackedGradients({expert: part}, stack.shape, samples))
        if bias_name is not None:
            summed = segment_sum(dy.to(torch.promote_types(dy.dtype, torch.float32)), offsets)
            rules.deliver(bias_name, StackedGradients({expert: DenseGradients(summed)}, biases.shape, samples))

    for name in (stack_name, bias_name):
        if name is not None:
            rules.used(name)
    with torch._C.DisableTorchFunction():
        matrix, bias = stack.detach()[expert], None if biases is None else biases.detach()[expert]
        return LinearBoundary.apply(rules.anchor, x, matrix, bias, module.is_transposed, site)
