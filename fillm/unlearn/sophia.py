"""Sophia-G: a step along the gradient average divided by a curvature average, every coordinate clipped.

Liu et al., arXiv 2305.14342, Algorithm 3, with the Gauss-Newton-Bartlett estimator of Algorithm 2:

    draw labels y' from the model's own softmax;  g' = gradient of the mean over n predictions of -log p(y')
    estimate = n g'^2

which is, in expectation, the diagonal of the Gauss-Newton matrix of the mean loss. Of several forward passes the mean
of their estimates is taken.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fillm_kernels import Selection, masked_sophia_, select_rows
from fillm_kernels.arguments import accumulation_dtype
from torch import Tensor, nn

from fillm.errors import UsageError

Logits = Callable[[], Tensor]  # one forward pass: logits at n counted positions, [n, V], with gradient


class Sophia(torch.optim.Optimizer):
    """Sophia-G (arXiv 2305.14342).

    Every `every`-th step wants a curvature estimate before it:

        if optimizer.due:
            optimizer.estimate(lambda: model(input_ids).logits[:, :-1][labels[:, 1:] != -100])
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    State, float32 (float64 for float64 parameters): `exp_avg`, the gradient average, and `hessian`, that of the
    estimates; nothing is kept between an estimate and the step.

    Args:
        params: parameters or groups of them, contiguous, float32 | bfloat16 | float16 | float64.
        lr: learning rate.
        betas: decay rates of the gradient average (each step) and of the estimates' (each estimate).
        gamma: scale of the curvature: the larger, the fewer coordinates are clipped.
        eps: least divisor.
        weight_decay: decoupled.
        every: steps between estimates, k of the paper.

    Raises:
        UsageError: a rate that cannot be.
    """

    def __init__(
        self,
        params: Any,
        lr: Tensor | float = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        every: int = 10,
    ) -> None:
        if not (float(lr) >= 0 and gamma >= 0 and eps > 0 and weight_decay >= 0):
            raise UsageError(
                f"Sophia: lr {lr}, gamma {gamma}, weight_decay {weight_decay} below 0, or eps {eps} not above"
            )
        if not all(0 <= beta < 1 for beta in betas) or every < 1:
            raise UsageError(f"Sophia: betas must lie in [0, 1) and every be at least 1; got {betas} and {every}")
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay, "every": every}
        super().__init__(params, defaults)

    @property
    def due(self) -> bool:
        """Whether the next step wants an estimate before it."""
        taken = max((int(state["step"]) for state in self.state.values()), default=0)
        return taken % self.param_groups[0]["every"] == 0

    def estimate(self, logits: Logits | Iterable[Logits], generator: torch.Generator | None = None) -> None:
        """Estimate the curvature and take it into the average; gradients in `.grad` stay as they are.

        Args:
            logits: gives the model's logits at n counted positions, [n, V], with gradient; or several of this kind, one
                a forward pass, whose estimates are averaged.
            generator: of the drawn labels; None is torch's own.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        flat = [lambda gradient: gradient.reshape(-1)] * len(parameters)
        betas = {p: group["betas"] for group in self.param_groups for p in group["params"]}
        for parameter, squares in zip(parameters, estimated(logits, parameters, flat, generator), strict=True):
            if squares is not None:
                state = started(self.state[parameter], parameter, parameter.numel())
                absorb(state, squares, betas[parameter][1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; averages of narrow parameters stay float32."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            for key in ("exp_avg", "hessian"):  # torch has just cast them to the parameter's type
                self.state[parameter][key] = saved[key].clone().to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the loss anew, if given.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                whole = (1, parameter.numel())
                row = select_rows(torch.zeros(1, dtype=torch.int64, device=parameter.device), whole)
                views = [parameter.detach().view(whole)], [parameter.grad.reshape(whole)]
                masked_step(*views, [self.state[parameter]], [row], group, 1.0)
        return loss


def masked_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    selections: Sequence[Selection],
    group: dict[str, Any],
    clip: Tensor | float,
) -> None:
    """One step on the selected weights of parameters on one device; a state is filled at the first one.

    Args:
        parameters: any shapes; changed.
        gradients: same shapes.
        states: `step`, `exp_avg` [count], `hessian` [count] of each.
        selections: of the parameters' weights.
        group: hyperparameters.
        clip: factor of the gradients.
    """
    for parameter, state, selection in zip(parameters, states, selections, strict=True):
        started(state, parameter, selection.count)
        state["step"] += 1
    masked_sophia_(
        parameters,
        gradients,
        [(state["exp_avg"], state["hessian"]) for state in states],
        selections,
        lr=group["lr"],
        betas=group["betas"],
        gamma=group["gamma"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        clip=clip,
    )


def started(state: dict[str, Any], parameter: Tensor, count: int) -> dict[str, Any]:
    """The state of a parameter of which `count` weights are stepped, made of zeros if it is empty."""
    if not state:
        dtype = accumulation_dtype(parameter.dtype)
        state["step"] = torch.zeros(())
        state["exp_avg"], state["hessian"] = (torch.zeros(count, dtype=dtype, device=parameter.device) for _ in "mh")
    return state


def estimated(
    logits: Logits | Iterable[Logits],
    parameters: Sequence[nn.Parameter],
    selected: Sequence[Callable[[Tensor], Tensor]],
    generator: torch.Generator | None,
) -> list[Tensor | None]:
    """The mean over forward passes of `n g'^2` (arXiv 2305.14342, Algorithm 2).

    Args:
        logits: one forward pass or several.
        parameters: what the estimates are for.
        selected: of each, gives the stepped weights of its gradient, [count].
        generator: of the drawn labels.

    Returns:
        One estimate a parameter, [count] float32 (float64 for float64), None where no logits depend on it.

    Raises:
        UsageError: logits that are not [n, V] with n at least 1, or without gradient.
    """
    passes = [logits] if callable(logits) else list(logits)
    means: list[Tensor | None] = [None] * len(parameters)
    for one in passes:
        gradients, count = sampled_gradients(one, parameters, generator)
        for place, (gradient, taken) in enumerate(zip(gradients, selected, strict=True)):
            if gradient is not None:
                own = taken(gradient).to(accumulation_dtype(gradient.dtype)).square().mul_(count / len(passes))
                before = means[place]
                means[place] = own if before is None else before.add_(own)
    return means


def sampled_gradients(
    logits: Callable[[], Tensor], parameters: Sequence[nn.Parameter], generator: torch.Generator | None
) -> tuple[Sequence[Tensor | None], int]:
    """Gradients of the mean loss on labels drawn from the model's prediction (arXiv 2305.14342, Algorithm 2).

    Returns:
        One gradient a parameter, None for one that the logits do not depend on; and n, the number of predictions.

    Raises:
        UsageError: logits that are not [n, V] with n at least 1, or without gradient.
    """
    with torch.enable_grad():
        given = logits()
        if given.ndim != 2 or not given.shape[0] or not given.requires_grad:
            raise UsageError(f"the estimate wants logits [n, V], n > 0, with gradient; got {list(given.shape)}")
        scores = given.float()
        labels = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = F.cross_entropy(scores, labels)
        return torch.autograd.grad(loss, list(parameters), allow_unused=True), given.shape[0]


def absorb(state: dict[str, Any], squares: Tensor, beta: float) -> None:
    """Take an estimate into the curvature average: `h <- beta h + (1 - beta) n g'^2`.

    Several processes average their estimates, so that their weights stay the same.

    Args:
        state: with `hessian` [S].
        squares: the estimate, [S]; changed.
        beta: decay rate of the average.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(squares)
        squares /= dist.get_world_size()
    state["hessian"].lerp_(squares.to(state["hessian"].dtype), 1 - beta)
