"""The closed-form step `theta - eta u`, as long as it takes to forget."""

import torch
from torch import Tensor

from benchmarks.forget_quality.models import Pair
from fillm.data import SampleSet, tokenize_rows
from fillm.evaluate.answer_tokens import token_pass
from fillm.masks import Mask
from fillm.rank import rank_parameters

_FIRST_RISE = 0.01  # nats a token that the shortest step tried would raise the forget loss by, to first order
_DOUBLINGS, _HALVINGS = 40, 8


def whole_update(one: Pair) -> dict[str, Tensor]:
    """`u` of SOIR for every tensor of the full model."""
    forget, retain = ([row.fields for row in one.rows[name]] for name in ("forget", "retain"))
    ranking = rank_parameters(one.full, one.tokenizer, forget, retain, save_update=True)
    assert ranking.updates is not None
    return dict(ranking.updates)


def one_shot(one: Pair, mask: Mask, update: dict[str, Tensor], start: dict[str, Tensor], goal: float) -> float:
    """Takes the shortest step inside a mask whose forget loss reaches a goal, to 1 part in 256 of a doubling.

    Args:
        one: whose full model is moved.
        mask: where.
        update: `u`.
        start: the selected tensors as they were.
        goal: forget loss in nats a token.

    Returns:
        `eta`, the length of the step; of the longest tried, if none reached the goal.
    """
    samples = tokenize_rows(one.rows["forget"], one.tokenizer)
    along = {name: torch.where(mask[name].to_bool(), update[name], 0.0) for name in mask}
    parameters = {name: p for name, p in one.full.named_parameters() if name in mask}

    def forget_loss(eta: float) -> float:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(start[name] - eta * along[name])
        return mean_loss(one, samples)

    unit = max(float(step.abs().max()) for step in along.values())
    short = _FIRST_RISE / unit if unit else 1.0
    long = short
    for _ in range(_DOUBLINGS):
        if forget_loss(long) >= goal:
            break
        short, long = long, 2.0 * long
    else:
        return long / 2.0
    for _ in range(_HALVINGS):
        middle = (short * long) ** 0.5
        if forget_loss(middle) >= goal:
            long = middle
        else:
            short = middle
    forget_loss(long)
    return long


def mean_loss(one: Pair, samples: SampleSet) -> float:
    """Mean over samples of each one's mean negative log-likelihood, nats a token."""
    found = token_pass(one.full, samples, tokens_per_batch=None)
    return sum(answer.loss for answer in found) / len(found)
