"""SOIR restated in float64: every sample alone, plain autograd, equations (1) to (3) of docs/method.md verbatim."""

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Row = dict[str, list[int]]  # input_ids, and labels with -100 where a token does not count


class WideFloats(TorchFunctionMode):
    """Models turn to float32 by name, or by default, for norms, routers and angles: here that means float64."""

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*(_widened(value) for value in args), **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclass(frozen=True)
class Reference:
    """Of one tensor: `v`, the update `u` and its length, the damping, all float64; no `u` where the damping is zero."""

    v: Tensor
    damping: float
    u: Tensor | None


def sample_loss(model: nn.Module, row: Row) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens of one sequence: no padding, no mask."""
    takes = inspect.signature(model.forward).parameters
    # Encoders that can decode leave the cache out of their signature, and some models cannot run without one.
    settings = {"use_cache": False} if "use_cache" in takes or "kwargs" in takes else {}
    logits = model(input_ids=torch.tensor([row["input_ids"]]), **settings).logits[0]
    logs = torch.log_softmax(logits.double(), dim=-1)
    terms = [-logs[at - 1, label] for at, label in enumerate(row["labels"]) if at and label != -100]
    return torch.stack(terms).mean()


def reference(
    model: nn.Module,
    forget: Sequence[Row],
    retain: Sequence[Row],
    damping: float = 0.1,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Reference]:
    """Every tensor's answer, by name; the model stays as it is.

    Args:
        model: in any float type; a copy of it in `dtype` is what is differentiated.
        forget: the samples whose mean gradient is `v`.
        retain: the samples of the curvature.
        damping: the factor in (1).
        dtype: float64, whatever the model turns to; or float32, for what rounding alone does to a model's gradients.
    """
    twin = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
    named = dict(twin.named_parameters())

    def gradients(row: Row) -> list[Tensor]:
        with WideFloats() if dtype == torch.float64 else nullcontext():
            found = torch.autograd.grad(sample_loss(twin, row), list(named.values()), allow_unused=True)
        return [
            torch.zeros_like(p).double() if g is None else g.double()
            for p, g in zip(named.values(), found, strict=True)
        ]

    of_forget, of_retain = [gradients(row) for row in forget], [gradients(row) for row in retain]
    answers = {}
    for place, name in enumerate(named):
        v = torch.stack([sample[place] for sample in of_forget]).mean(0)
        each = [sample[place] for sample in of_retain]
        lambda_ = damping * sum(float(g.square().mean()) for g in each) / len(each)
        u = None
        if lambda_ > 0.0:
            inner = sum(v - g * ((g * v).sum() / (lambda_ + g.square().sum())) for g in each)
            u = -inner / (len(each) * lambda_)
        answers[name] = Reference(v, lambda_, u)
    return answers
