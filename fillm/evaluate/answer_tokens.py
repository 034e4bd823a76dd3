"""One length-bucketed pass over all answers that any metric asks for: what the model thinks of every token of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fillm.capture import frozen
from fillm.capture.losses import answer_logits, answer_offsets, row_blocks
from fillm.data import SampleSet, collate, plan_batches
from fillm.errors import NumericsError
from fillm.evaluate.dealing import Deal
from fillm.evaluate.halving import Halving
from fillm.models.finite import not_finite
from fillm.rank.console import Progress

# Of a token this unlikely the probability is 0 in float32 and float64 alike: it adds nothing to a mean under p.
_LEAST_LOG_PROB = -800.0
_INTEGERS, _NUMBERS, _MOMENTS = ("token_ids", "predicted"), ("log_probs",), ("mean_log_probs", "std_log_probs")


@dataclass(frozen=True)
class AnswerTokens:
    """What a model thinks of the T tokens of one answer, the end-of-sequence token included, under teacher forcing.

    Attributes:
        token_ids: [T] int64, the answer.
        log_probs: [T] float64, natural log of the probability of each answer token.
        predicted: [T] int64, the likeliest token at each place.
        mean_log_probs: [T] float64, the mean of log p over the vocabulary under p (minus the entropy), or None.
        std_log_probs: [T] float64, its standard deviation under p, or None.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    predicted: np.ndarray
    mean_log_probs: np.ndarray | None = None
    std_log_probs: np.ndarray | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, in nats a token."""
        return -float(self.log_probs.mean())


def columns_of(answers: Mapping[int, AnswerTokens], counts: Sequence[int], moments: bool) -> dict[str, Tensor]:
    """All answers one after another, a tensor a field.

    Args:
        answers: by position; those that are not there have zeros.
        counts: tokens of every answer, N together.
        moments: whether the answers have those over the vocabulary.

    Returns:
        [N] int64 or float64, by the names of the fields.
    """
    total = sum(counts)
    columns = {name: torch.zeros(total, dtype=torch.int64) for name in _INTEGERS}
    numbers = _NUMBERS + _MOMENTS if moments else _NUMBERS
    columns |= {name: torch.zeros(total, dtype=torch.float64) for name in numbers}
    for position, (begin, end) in enumerate(pairwise(accumulate(counts, initial=0))):
        if position in answers:
            for name, column in columns.items():
                column[begin:end] = torch.from_numpy(getattr(answers[position], name))
    return columns


def answers_of(columns: Mapping[str, Tensor], counts: Sequence[int]) -> list[AnswerTokens]:
    """The answers that `columns_of` put one after another."""
    arrays = {name: column.numpy() for name, column in columns.items()}
    spans = pairwise(accumulate(counts, initial=0))
    return [AnswerTokens(**{name: array[begin:end] for name, array in arrays.items()}) for begin, end in spans]


def token_pass(
    model: nn.Module,
    samples: SampleSet,
    *,
    tokens_per_batch: int | None,
    batch_size: int | None = None,
    vocabulary_moments: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    deal: Deal | None = None,
) -> list[AnswerTokens]:
    """What a model thinks of every answer token of a set.

    Probabilities are computed in float32 (float64 for a float64 model), a block of rows at a time, whatever the dtype
    of the weights. They do not depend on how samples are batched but for the rounding of the model's own products.

    Args:
        model: a causal language model on its device; comes back in the mode it came in.
        samples: at least one.
        tokens_per_batch: most tokens of a batch, padding included; None for the default of `plan_batches`.
        batch_size: most samples of a batch; None for no limit.
        vocabulary_moments: compute `mean_log_probs` and `std_log_probs` too.
        progress: told of every batch.
        notice: told when batches are halved for want of memory.
        deal: of the batches to several processes, which all get the whole result.

    Returns:
        One entry a sample, in the order of `samples`.

    Raises:
        NumericsError: a probability that is no number; names the sample.
        OutOfMemoryError: not even one sample fits.
    """
    device = next(model.parameters()).device
    found: dict[int, AnswerTokens] = {}
    lengths = samples.lengths

    def work(part: list[int]) -> None:
        batch = collate(samples, part).to(device)
        logits, wanted = answer_logits(model, batch)
        ends = answer_offsets(batch).tolist()
        statistics = _statistics(logits, wanted, vocabulary_moments)
        for number, position in enumerate(part):
            rows = slice(ends[number], ends[number + 1])
            found[position] = AnswerTokens(*(None if one is None else one[rows].copy() for one in statistics))
            if not np.isfinite(found[position].log_probs).all():
                raise NumericsError(not_finite(model, f"a probability of sample {samples[position].id}"))
        if progress is not None:
            loss = sum(found[position].loss for position in part) / len(part)
            progress.advance(len(part), sum(lengths[position] for position in part), loss)

    halving, deal = Halving(notice), deal or Deal()
    plan = plan_batches(lengths, tokens_per_batch, max_samples=batch_size)
    with frozen(model), torch.no_grad():
        deal.run(
            samples.source,
            plan,
            lambda members: halving.run(members, work, lengths.__getitem__),
            progress,
            lambda members: sum(lengths[position] for position in members),
        )
    if deal.processes.count > 1:
        counts = [sample.num_counted for sample in samples]
        columns = columns_of(found, counts, vocabulary_moments)
        deal.share(columns)
        return answers_of(columns, counts)
    return [found[position] for position in range(len(samples))]


def _statistics(
    logits: Tensor, wanted: Tensor, moments: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The columns of `AnswerTokens` for the [N, V] logits of a whole batch."""
    precision = torch.promote_types(logits.dtype, torch.float32)
    log_probs, means, deviations = (torch.empty(len(wanted), dtype=precision, device=logits.device) for _ in range(3))
    predicted = torch.empty_like(wanted)
    for rows in row_blocks(logits):
        log_p = torch.log_softmax(logits[rows], dim=1, dtype=precision)
        log_probs[rows] = log_p.gather(1, wanted[rows, None])[:, 0]
        predicted[rows] = logits[rows].argmax(1)  # not of log_p, in which rounding may make two logits equal
        if moments:
            log_p.clamp_(min=_LEAST_LOG_PROB)
            p = log_p.exp()
            means[rows] = (p * log_p).sum(1)
            deviations[rows] = (p * (log_p - means[rows, None]).square()).sum(1).sqrt()
    columns = wanted.cpu().numpy(), log_probs.double().cpu().numpy(), predicted.cpu().numpy()
    if not moments:
        return *columns, None, None
    return *columns, means.double().cpu().numpy(), deviations.double().cpu().numpy()
