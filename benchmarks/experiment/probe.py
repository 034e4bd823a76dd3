"""What keeping costs along the step that the optimiser takes first: measured, one tensor at a time.

Adam divides a gradient by the root of its second moment, which at the first step is its own size (Kingma and Ba, arXiv
1412.6980): the step is the sign of the forget gradient. A tensor alone is moved along it until the forget loss has
risen by so much; the rise of the retain loss is read there. Slope, curvature and what lies beyond are all in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.experiment.case import Case
from fillm.capture import frozen, sample_losses
from fillm.data import SampleSet, collate, tokenize_rows
from fillm.rank.path_step import find_length

BATCH = 40


def step_costs(case: Case, names: Sequence[str], rise: float) -> dict[str, float]:
    """The rise of the retain loss, by tensor, where the forget loss has risen by `rise`; infinity if it never does.

    Args:
        case: the model; comes back as it was.
        names: of tensors.
        rise: nats a token.
    """
    sets = {name: tokenize_rows(rows, case.tokenizer, source=name) for name, rows in case.rows.items()}
    gradients = mean_gradient(case.model, sets["forget"], names)
    parameters = dict(case.model.named_parameters())
    start = {name: mean_loss(case.model, some) for name, some in sets.items()}

    def at(name: str, length: float, which: str) -> float:
        parameter, direction = parameters[name], gradients[name].sign()
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(direction, alpha=length)
        try:
            return mean_loss(case.model, sets[which]) - start[which]
        finally:
            with torch.no_grad():
                parameter.copy_(before)

    costs = {}
    for name in names:
        length = find_length(lambda length, name=name: at(name, length, "forget"), rise)
        costs[name] = float("inf") if length is None else at(name, length, "retain")
    return costs


def mean_loss(model: nn.Module, samples: SampleSet) -> float:
    """Mean over samples, nats a token."""
    total = 0.0
    with frozen(model), torch.no_grad():
        for begin in range(0, len(samples), BATCH):
            chosen = list(range(begin, min(begin + BATCH, len(samples))))
            total += float(sample_losses(model, collate(samples, chosen)).double().sum())
    return total / len(samples)


def mean_gradient(model: nn.Module, samples: SampleSet, names: Sequence[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    asked = [parameter.requires_grad for parameter in wanted]
    total = [torch.zeros_like(parameter) for parameter in wanted]
    was = model.training
    model.eval()
    try:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for begin in range(0, len(samples), BATCH):
            chosen = list(range(begin, min(begin + BATCH, len(samples))))
            loss = sample_losses(model, collate(samples, chosen)).sum()
            for sum_, gradient in zip(total, torch.autograd.grad(loss, wanted), strict=True):
                sum_ += gradient
    finally:
        model.train(was)
        for parameter, before in zip(wanted, asked, strict=True):
            parameter.requires_grad_(before)
    return {name: gradient / len(samples) for name, gradient in zip(names, total, strict=True)}
